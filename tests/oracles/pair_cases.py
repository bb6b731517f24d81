"""The settings of pair losses that are compared with TRL: case -> fields of the method's section."""

# `pair`: of one pair alone.
DPO = {
    "sigmoid": {"beta": 0.3},
    "sigmoid smoothed": {"beta": 0.5, "label_smoothing": 0.4, "pair": 1},
    "robust": {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.2},
    "hinge": {"loss_type": "hinge", "beta": 0.3},
    "ipo": {"loss_type": "ipo", "beta": 0.4},
    "exo_pair": {"loss_type": "exo_pair", "beta": 0.3, "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": "nca_pair", "beta": 0.3},
    "bco_pair": {"loss_type": "bco_pair", "beta": 0.3},
    "sppo_hard": {"loss_type": "sppo_hard", "beta": 0.3},
    "apo_zero": {"loss_type": "apo_zero", "beta": 0.3},
    "apo_down": {"loss_type": "apo_down", "beta": 0.3},
    "sigmoid_norm": {"loss_type": "sigmoid_norm", "beta": 2.0},
    "several": {"loss_type": "sigmoid,bco_pair,sft", "loss_weights": "0.8,0.2,0.5", "beta": 0.3},
    "sft_weight": {"sft_weight": 0.7, "beta": 0.3},
    "ld_alpha": {"ld_alpha": 0.4, "beta": 0.3},
    "ld_alpha of 0, sft_weight": {"ld_alpha": 0.0, "sft_weight": 0.3, "beta": 0.3},
    "use_weighting": {"use_weighting": True, "beta": 0.3},
    "use_weighting, several": {"use_weighting": True, "loss_type": "ipo,apo_zero", "beta": 0.3},
    "forward_kl": {"f_divergence_type": "forward_kl", "beta": 0.3},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_type": "sigmoid_norm", "beta": 0.3},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "loss_type": "hinge,ipo", "beta": 0.3},
    "alpha_divergence above 1": {
        "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5, "beta": 0.3,
    },
}  # fmt: skip
ORPO = {"paper": {"beta": 0.4}, "as TRL": {"beta": 0.4, "nll_on_prompt": True}}
CPO = {
    "sigmoid": {"beta": 0.2},
    "sigmoid smoothed": {"beta": 0.2, "label_smoothing": 0.1, "cpo_alpha": 0.0},
    "hinge": {"loss_type": "hinge", "beta": 0.2, "cpo_alpha": 0.5},
    "ipo": {"loss_type": "ipo", "beta": 0.2},
}
SIMPO = {"default": {}, "smoothed": {"beta": 2.5, "gamma": 1.0, "label_smoothing": 0.1}}
CASES = {"dpo": DPO, "orpo": ORPO, "cpo": CPO, "simpo": SIMPO}
ALL = [(method, case) for method in CASES for case in CASES[method]]


def settings(method, case):
    """The fields of a case."""
    return CASES[method][case]
