"""What is refused in a config, and in which words."""

import pytest
from config_files import with_fields

from jaxft.config import MethodConfig, choices, resolve
from jaxft.errors import ConfigError

METHODS = ", ".join(choices(MethodConfig, "name"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_dir": "runs/a\0b"}, "output_dir='runs/a.x00b' holds a zero byte"),
        ({"model.dtype": "float16"}, "model.dtype='float16' is not one of float32, bfloat16"),
        ({"model.param_dtype": "bf16"}, "model.param_dtype='bf16' is not one of"),
        (
            {"model.remat": "ful"},
            "model.remat='ful' is not one of none, full, attention, dots, offload, auto. Did you mean 'full'?",
        ),
        ({"adapter.kind": "lorra"}, "adapter.kind='lorra'.*Did you mean 'lora'?"),
        ({"adapter.init_lora_weights": "pisa"}, "init_lora_weights='pisa' is not one of default, gaussian, pissa"),
        (
            {"adapter.layers_to_transform": "0-3,x"},
            "layers_to_transform='0-3,x': 'x' is neither a layer such as 8 nor a range such as 0-3",
        ),
        ({"adapter.layers_to_transform": "3-0"}, "'3-0' is neither a layer"),
        ({"adapter.layers_to_transform": " "}, "layers_to_transform is empty"),
        (
            {"adapter.rank_pattern": "q_proj"},
            "rank_pattern='q_proj': 'q_proj' is not of the form pattern:number, such as q_proj:8",
        ),
        ({"adapter.rank_pattern": "q_proj:0"}, "'q_proj:0' needs a pattern and a number above zero"),
        ({"adapter.alpha_pattern": "q_(proj:2"}, "'q_(proj:2' is not of the form pattern:number, such as q_proj:8"),
        ({"data.format": "mesages"}, "data.format='mesages'.*Did you mean 'messages'?"),
        ({"data.train_on": "user"}, "data.train_on='user' is not one of assistant, last, all"),
        ({"data.truncation": "middle"}, "data.truncation='middle' is not one of refuse, drop, right, left, windows"),
        ({"data.window_overlap": 9}, "data.window_overlap=9 is read only if data.truncation is 'windows'"),
        (
            {"data.truncation": "windows", "data.max_length": 16, "data.window_overlap": 16},
            "data.window_overlap=16 must be below data.max_length=16",
        ),
        ({"optim.name": "adam"}, "optim.name='adam'.*Did you mean 'adamw'?"),
        ({"optim.name": "adamw8bit"}, "optim.name='adamw8bit'.*Did you mean 'adamw_8bit'?"),
        *(
            (
                {f"optim.{key}": value, "optim.name": name, "optim.schedule": "constant", "adapter.kind": "none"},
                f"optim.{key}={value!r} is read only if optim.name is {key.split('.')[0]!r}, but optim.name={name!r}. "
                f"Set optim.{key} to {default!r}, or set optim.name to {key.split('.')[0]!r}.{hint}$",
            )
            for key, value, default, name, hint in [
                ("adamw.b2", 0.95, 0.999, "sgd", ""),
                ("adamw.b1", 0.8, 0.9, "lion", " With optim.name='lion', optim.lion.b1 is read."),
                ("adamw_8bit.eps", 1e-6, 1e-8, "lion", ""),
                ("sgd.momentum", 0.8, 0.9, "adamw", ""),
                ("apollo.rank", 64, 256, "muon", ""),
                ("adafactor.scale_parameter", True, False, "adamw_8bit", ""),
                ("lion.moments_dtype", "bfloat16", "float32", "adafactor", ""),
                ("muon.b1", 0.8, 0.9, "schedule_free_adamw", " With .*, optim.schedule_free_adamw.b1 is read."),
                ("schedule_free_adamw.b2", 0.99, 0.999, "adafactor", ""),
            ]
        ),
        ({"optim.name": "schedule_free_adamw"}, "so optim.schedule='cosine' would slow it down twice: set optim.sch"),
        (
            {"optim.name": "schedule_free_adamw", "optim.schedule": "constant", "optim.schedule_free_adamw.b1": 0.0},
            "optim.schedule_free_adamw.b1=0.0 must be above 0 and below 1: 0 leaves no average, and 0.9 to",
        ),
        (
            {"optim.name": "schedule_free_adamw", "optim.schedule": "constant", "train.ema_decay": 0.9},
            "averages the weights itself: set train.ema_decay=0.9 to None",
        ),
        ({"optim.name": "apollo"}, "projects large matrices to a low rank, and adapter.kind='lora' trains only a few"),
        *(
            (
                {"optim.loraplus_lr_ratio": 16.0, "adapter.kind": kind},
                f"optim.loraplus_lr_ratio=16.0 is read only if adapter.kind is 'lora', but adapter.kind='{kind}'. It "
                "scales the learning rate of LoRA's B, which other adapters do not have. Set optim.loraplus_lr_ratio "
                "to None, or set adapter.kind to 'lora'.",
            )
            for kind in ("none", "vera")
        ),
        *(
            (
                {f"adapter.{name}": value, "adapter.kind": kind},
                f"adapter.{name}={value!r} is read only if adapter.kind is {reader!r}, but adapter.kind={kind!r}. Set",
            )
            for name, value, reader in [
                ("use_rslora", True, "lora"),
                ("use_dora", True, "lora"),
                ("init_lora_weights", "pissa", "lora"),
                ("exclude_modules", "q_proj", "lora"),
                ("layers_to_transform", "0", "lora"),
                ("rank_pattern", "q_proj:8", "lora"),
                ("alpha_pattern", "q_proj:8", "lora"),
                ("feedforward_modules", "up_proj", "ia3"),
                ("prompt_init_text", "hi", "prompt"),
            ]
            for kind in ("none", "vera", "prefix")
        ),
        (
            {"model.quantization": "nf4", "adapter.kind": "none"},
            "model.quantization='nf4' is read only if adapter.kind is 'lora', .* or '.*', but "
            "adapter.kind='none'. Quantized weights are frozen, but adapter.kind='none' trains every weight. Set "
            "model.quantization to None, or set adapter.kind to one of those.",
        ),
        ({"adapter.init_lora_weights": "loftq"}, "init_lora_weights='loftq' corrects the error of quantization, but"),
        (
            {"adapter.init_lora_weights": "loftq", "adapter.use_dora": True, "model.quantization": "nf4"},
            "init_lora_weights='loftq' changes the base that the lengths of adapter.use_dora are taken from: set adap",
        ),
        (
            {"adapter.kind": "prefix", "adapter.modules_to_save": "norm"},
            "modules_to_save='norm' cannot be written to PEFT's folders of adapter.kind='prefix'",
        ),
        (
            {"method.sft.loss_type": "dft", "method.sft.label_smoothing_factor": 0.1},
            "set method.sft.label_smoothing_factor=0.1 to 0",
        ),
        ({"method.sft.loss_type": "nl"}, "method.sft.loss_type='nl' is not one of nll, dft"),
        ({"method.name": "sfd"}, f"method.name='sfd' is not one of {METHODS}. Did you mean 'sft'?"),
        (
            {"train.use_ema": False},
            "train.use_ema=False is read only if train.ema_decay is set, but it is not. There is no average to leave "
            "out. Set train.use_ema to True, or set train.ema_decay.",
        ),
        *(
            ({key: value}, f"{key}={value} must be above 0 and below 1$")
            for key in ("optim.layer_decay", "data.eval_fraction")
            for value in (0.0, 1.0, 1.5)
        ),
        *(
            ({key: -1.0}, f"{key}=-1.0 must be zero or more")
            for key in ("method.sft.z_loss", "router.z_loss", "router.load_balancing", "optim.weight_decay")
        ),
        ({"optim.schedule": "cosin"}, "optim.schedule='cosin'.*Did you mean 'cosine'?"),
        ({"checkpoint.best_mode": "lowest"}, "checkpoint.best_mode='lowest' is not one of min, max"),
        ({"eval.metric": "bleu", "data.eval": "e"}, "eval.metric='bleu' is not one of"),
        *(
            ({key: value}, f"{key}={value} must be above zero")
            for key, value in {
                "adapter.r": 0,
                "adapter.alpha": 0.0,
                "adapter.num_virtual_tokens": 0,
                "data.max_length": 0,
                "data.limit": -1,
                "data.eval_limit": 0,
                "optim.learning_rate": 0.0,
                "optim.adamw.eps": 0.0,
                "optim.adamw_8bit.eps": 0.0,
                "optim.muon.eps": -1.0,
                "optim.schedule_free_adamw.eps": 0.0,
                "optim.clip_norm": -1.0,
                "optim.apollo.rank": 0,
                "optim.loraplus_lr_ratio": 0.0,
                "method.sft.neftune_noise_alpha": 0.0,
                "method.dpo.beta": 0.0,
                "train.batch_size": 0,
                "train.accumulation_steps": -2,
                "train.epochs": 0.0,
                "train.steps": 0,
                "train.log_every": 0,
                "train.eval_every": 0,
                "checkpoint.every": 0,
                "checkpoint.keep": 0,
                "eval.limit": 0,
                "eval.max_new_tokens": 0,
                "eval.batch_size": 0,
            }.items()
        ),
        *(
            ({key: value}, f"{key}={value} must be at least 0 and below 1")
            for key, value in {
                "adapter.dropout": 1.0,
                "optim.warmup_ratio": -0.1,
                "optim.adamw.b1": 1.0,
                "optim.adamw.b2": 1.0,
                "optim.lion.b1": 1.0,
                "optim.lion.b2": -0.5,
                "optim.sgd.momentum": 1.0,
                "optim.muon.momentum": 1.0,
                "method.sft.label_smoothing_factor": 1.0,
                "train.ema_decay": 1.0,
            }.items()
        ),
        ({"optim.min_ratio": 1.5}, "optim.min_ratio=1.5 must be from 0 to 1"),
        ({"optim.learning_rate": float("nan")}, "optim.learning_rate=nan must be above zero"),
        ({"model.path": ""}, "model.path is empty"),
        ({"data.train": ""}, "data.train is empty"),
        (
            {"optim.warmup_steps": 5, "optim.warmup_ratio": 0.1},
            "optim.warmup_steps=5 and optim.warmup_ratio=0.1 both set the length of warm-up: set one of them to None",
        ),
        ({"optim.warmup_steps": -5}, "optim.warmup_steps=-5 must be zero or more"),
        (
            {"train.batch_size": 10, "train.accumulation_steps": 4},
            "train.batch_size=10 does not divide into train.accumulation_steps=4 equal micro-batches: make the former",
        ),
        ({"adapter.target_modules": " , "}, "adapter.target_modules is empty"),
        (
            {"adapter.kind": "prompt", "adapter.num_virtual_tokens": 64, "data.max_length": 64},
            "leaves no room for rows",
        ),
        ({"adapter.kind": "prefix", "export.merged": True}, "adapter.kind='prefix' cannot be merged into weights"),
        (
            {"model.trainable": "mlp"},
            "model.trainable='mlp' is read only if adapter.kind is 'none', but adapter.kind='lora'. It chooses which "
            "parameters of the model are trained, and beside an adapter all are frozen. Set model.trainable to None",
        ),
        ({"data.eval": "e", "data.eval_fraction": 0.1}, "two held-out sets"),
        ({"eval.metric": "exact_match"}, "eval.metric='exact_match' scores held-out rows, but there are none"),
        ({"eval.metric": "exact_match", "data.eval": "e", "data.format": "text"}, "data.format='text' has no answers"),
        ({"checkpoint.best_metric": "eval_loss"}, "checkpoint.best_metric='eval_loss' needs held-out rows"),
        (
            {"checkpoint.best_metric": "eval_loss", "data.eval": "e", "checkpoint.every": 3, "train.eval_every": 2},
            "checkpoint.every=3 is not a multiple of train.eval_every=2: set train.eval_every to a divisor",
        ),
        (
            {"checkpoint.best_metric": "eval_loss", "data.eval": "e", "checkpoint.every": 3},
            "checkpoint.every=3 is not a multiple of train.eval_every=None",
        ),
        (
            {
                "checkpoint.best_metric": "eval_loss",
                "data.eval": "e",
                "checkpoint.every_epochs": 1.0,
                "train.eval_every_epochs": 0.4,
            },
            "checkpoint.every_epochs=1.0 is not a multiple of train.eval_every_epochs=0.4: set the latter to the same",
        ),
        (
            {"checkpoint.best_metric": "eval_loss", "data.eval": "e", "checkpoint.every_epochs": 1.0},
            "checkpoint.every_epochs=1.0 is not a multiple of train.eval_every_epochs=None",
        ),
        (
            {"train.eval_every": 3, "train.eval_every_epochs": 1.0},
            "counts steps and train.eval_every_epochs=1.0 epochs",
        ),
        (
            {"checkpoint.every": 3, "checkpoint.every_epochs": 1.0},
            "counts steps and checkpoint.every_epochs=1.0 epochs",
        ),
        ({"export.checkpoint": "best"}, "needs a metric by which checkpoints are compared: set checkpoint.best_metric"),
        (
            {"export.checkpoint": "best", "checkpoint.best_metric": "eval_loss", "data.eval": "e"},
            "there is only one, at the end: set checkpoint.every or checkpoint.every_epochs",
        ),
        ({"train.early_stopping_patience": 3}, "needs a metric that is watched: set checkpoint.best_metric"),
        (
            {"train.early_stopping_patience": 3, "checkpoint.best_metric": "eval_loss", "data.eval": "e"},
            "counts evaluations, and there is only one, at the end: set train.eval_every or train.eval_every_epochs",
        ),
        ({"train.early_stopping_threshold": 0.1}, "is read only if train.early_stopping_patience is set"),
        (
            {"checkpoint.best_metric": "eval_perplexity", "data.eval": "e", "method.name": "dpo"},
            "best_metric='eval_perplexity' is not reported by method.name='dpo': set it to one of eval_loss, eval_rew",
        ),
        (
            {"checkpoint.best_metric": "eval_rewards/margins", "data.eval": "e"},
            "best_metric='eval_rewards/margins' is not reported by method.name='sft': set it to one of eval_loss, eval",
        ),
        (
            {"method.dpo.beta": 0.2},
            "method.dpo.beta=0.2 is read only if method.name is 'dpo', but method.name='sft'. Set method.dpo.beta to",
        ),
        (
            {"method.sft.z_loss": 1e-4, "method.name": "dpo"},
            "method.sft.z_loss=0.0001 is read only if method.name is 'sft', but method.name='dpo'. Set method.sft.z_lo",
        ),
        *(
            ({"method.name": "dpo", "method.dpo.label_smoothing": value}, f"={value} must be at least 0 and below 0.5$")
            for value in (0.5, -0.1)
        ),
        ({"mesh.data": 0}, "mesh.data=0 must be a positive number"),
        ({"mesh.fsdp": -2}, "mesh.fsdp=-2 must be a positive number"),
        (
            {"mesh.data": -1, "mesh.fsdp": -1},
            "mesh.data and mesh.fsdp are -1, but only one axis can take the devices that remain",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_carried_out_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace("(", r"\(").replace("+", r"\+")):
        resolve(with_fields(fields))
