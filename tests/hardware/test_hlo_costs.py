"""Costs read from compiled programs whose work is known by hand."""

# M rows, K inner, N columns, L loops

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxft.hardware import hlo
from jaxft.hardware.costs import Transfer, costs_of
from jaxft.hardware.groups import axes_of, collectives, groups_of
from jaxft.objectives.vocabulary import AT_MOST

AXES = {"data": 2, "fsdp": 4}


def compiled(function, *shapes, **options):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(function, **options).lower(*args).compile().as_text())


def mesh():
    return jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(AxisType.Auto,) * 2)


def test_a_product_counts_two_flops_a_multiplication():
    costs = costs_of(compiled(jnp.matmul, (32, 64), (64, 128)), {"fsdp": 1})
    assert costs.flops == 2 * 32 * 64 * 128
    assert costs.hbm_bytes == 4 * (32 * 64 + 64 * 128 + 32 * 128)
    assert not costs.transfers and not costs.unknown


def test_a_scanned_product_counts_every_turn_and_reads_only_its_slice():
    def run(w_LKK, x_MK):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_MK, w_LKK)[0]

    costs = costs_of(compiled(run, (5, 64, 64), (32, 64)), {"fsdp": 1})
    assert costs.flops == 5 * 2 * 32 * 64 * 64
    # Slices of all weights, read and written once and read again for the product: not the whole stack each turn.
    assert 3 * 4 * 5 * 64 * 64 <= costs.hbm_bytes < 2 * (3 * 4 * 5 * 64 * 64 + 5 * 6 * 4 * 32 * 64)


NARROW = """ENTRY %main (x: s8[32,64], w: s8[64,16], v: bf16[16,8]) -> bf16[32,8] {
  %x = s8[32,64] parameter(0)
  %w = s8[64,16] parameter(1)
  %v = bf16[16,8] parameter(2)
  %y = s32[32,16] fusion(%x, %w), kind=kOutput, calls=%inside
  %f = f32[32,16] convert(%y)
  %z = bf16[32,16] multiply(%f, %f), metadata={op_name="jit(f)/narrow_codes/mul"}
  ROOT %u = bf16[32,8] dot(%z, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
INSIDE = """HloModule m

%inside (a: s8[32,64], b: s8[64,16]) -> s32[32,16] {
  %a = s8[32,64] parameter(0)
  %b = s8[64,16] parameter(1)
  ROOT %c = s32[32,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

"""


def test_products_of_8_bits_are_told_from_others():
    costs = costs_of(hlo.parse(INSIDE + NARROW), {"fsdp": 1})
    assert (costs.narrow, costs.flops) == (2 * 32 * 64 * 16, 2 * 32 * 64 * 16 + 2 * 32 * 16 * 8)
    assert costs.rounded == 32 * 16


RESHAPED = """%same (a: bf16[32,64]) -> bf16[32,64] {
  %a = bf16[32,64] parameter(0)
  ROOT %b = bf16[32,64] bitcast(%a)
}

%inside (x: bf16[32,64], w: bf16[64,16], unread: bf16[32,64]) -> bf16[32,16] {
  %x = bf16[32,64] parameter(0)
  %w = bf16[64,16] parameter(1)
  %unread = bf16[32,64] parameter(2)
  %same.1 = bf16[32,64] fusion(%x), kind=kLoop, calls=%same
  %same.2 = bf16[32,64] fusion(%unread), kind=kLoop, calls=%same
  ROOT %y = bf16[32,16] dot(%same.1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[32,64], w: bf16[64,16], unread: bf16[32,64]) -> bf16[32,16] {
  %x = bf16[32,64] parameter(0)
  %w = bf16[64,16] parameter(1)
  %unread = bf16[32,64] parameter(2)
  ROOT %y = bf16[32,16] fusion(%x, %w, %unread), kind=kOutput, calls=%inside
}
"""


def test_an_operand_that_a_fusion_passes_on_counts_where_it_is_read():
    # Products for TPUs read their operands through such fusions.
    costs = costs_of(hlo.parse(RESHAPED), {"fsdp": 1})
    assert costs.hbm_bytes == 2 * (32 * 64 + 64 * 16 + 32 * 16)


def test_nested_scans_multiply():
    def run(w_LKK, x_MK):
        def inner(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, w_LKK)[0], None), x_MK, None, length=3)[0]

    assert costs_of(compiled(run, (5, 64, 64), (32, 64)), {"fsdp": 1}).flops == 3 * 5 * 2 * 32 * 64 * 64


@pytest.mark.parametrize(("start", "stop", "step", "turns"), [(0, 7, 1, 7), (3, 20, 4, 5), (10, 0, -2, 5)])
def test_a_loop_turns_by_its_start_bound_and_step(start, stop, step, turns):
    def run(x_MM):
        def goes_on(carry):
            return carry[0] < stop if step > 0 else carry[0] > stop

        return jax.lax.while_loop(goes_on, lambda carry: (carry[0] + step, carry[1] @ carry[1]), (start, x_MM))[1]

    assert costs_of(compiled(run, (32, 32)), {"fsdp": 1}).flops == turns * 2 * 32**3


def test_a_loop_that_data_ends_counts_once_and_says_so_unless_its_name_bounds_it():
    def run(x_MM, bound, name):
        with jax.named_scope(name):
            return jax.lax.while_loop(lambda c: c[0] < bound[0], lambda c: (c[0] + 1, c[1] @ c[1]), (0.0, x_MM))[1]

    unbounded = costs_of(compiled(lambda x, b: run(x, b, "free"), (32, 32), (1,)), {"fsdp": 1})
    assert unbounded.flops == 2 * 32**3
    assert any("counted once" in line for line in unbounded.unknown)
    bounded = costs_of(compiled(lambda x, b: run(x, b, f"{AT_MOST}6"), (32, 32), (1,)), {"fsdp": 1})
    assert bounded.flops == 6 * 2 * 32**3 and not bounded.unknown

    def with_tangent(x, b):
        return jax.jvp(lambda x: run(x, b, f"{AT_MOST}6"), (x,), (x,))

    # Under a transformation the name reads jvp(turns_at_most_6).
    assert not costs_of(compiled(with_tangent, (32, 32), (1,)), {"fsdp": 1}).unknown


def test_a_conditional_counts_its_costlier_branch():
    def run(x_MM):
        return jax.lax.cond(x_MM[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x_MM)

    assert costs_of(compiled(run, (64, 64)), {"fsdp": 1}).flops == 2 * 2 * 64**3


def test_a_caller_who_knows_more_chooses_trips_and_branch():
    def run(x_MM, bound):
        def turn(carry):
            return carry[0] + 1, jax.lax.cond(carry[0] > 2, lambda x: x @ x @ x, lambda x: x @ x, carry[1])

        return jax.lax.while_loop(lambda carry: carry[0] < bound[0], turn, (0.0, x_MM))[1]

    program = compiled(run, (64, 64), (1,))
    costs = costs_of(program, {"fsdp": 1}, trips=16, branch=lambda conditional, branches: branches[0])
    assert costs.flops == 16 * 2 * 64**3 and not costs.unknown


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_collectives_count_received_bytes_by_kind_and_axis():
    def run(x_MK):
        whole = jax.lax.all_gather(x_MK, "fsdp", tiled=True)  # [32, 128]
        part = jax.lax.psum_scatter(whole, "fsdp", tiled=True)  # [8, 128]
        total = jax.lax.psum(part, ("data", "fsdp"))
        passed = jax.lax.ppermute(total, "data", [(0, 1), (1, 0)])
        return jax.lax.all_to_all(passed, "fsdp", 0, 0, tiled=True)

    spec = P(("data", "fsdp"))
    mapped = jax.shard_map(run, mesh=mesh(), in_specs=spec, out_specs=spec, check_vma=False)
    size = 8 * 128 * 4
    assert costs_of(compiled(mapped, (64, 128)), AXES).transfers == Counter(
        {
            Transfer("all-gather", ("fsdp",), 3 * size): 1,
            Transfer("reduce-scatter", ("fsdp",), 3 * size): 1,
            Transfer("all-reduce", ("data", "fsdp"), 2 * size * 7 // 8): 1,
            Transfer("collective-permute", ("data",), size): 1,
            Transfer("all-to-all", ("fsdp",), size * 3 // 4): 1,
        }
    )


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_collective_in_a_loop_counts_every_turn():
    def run(w_LKN, x_MK):
        def body(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True)), None

        return jax.lax.scan(body, x_MK, w_LKN)[0]

    specs = (P(None, "fsdp"), P("data"))
    mapped = jax.shard_map(run, mesh=mesh(), in_specs=specs, out_specs=P("data"), check_vma=False)
    costs = costs_of(compiled(mapped, (6, 64, 64), (32, 64)), AXES)
    assert costs.flops == 6 * 2 * 16 * 64 * 64
    assert costs.bytes_by("axes") == {"fsdp": 6 * 3 * 16 * 64 * 4}


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp",)),
        ("replica_groups=[2,4]<=[8]", ("fsdp",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("fsdp",)),
        ("source_target_pairs={{0,4},{4,0},{1,5}}", ("data",)),
        ("", ("data", "fsdp")),
    ],
)
def test_groups_are_read_in_every_form(text, axes):
    call = hlo.Instruction("x", "all-reduce", (), "", f", channel_id=1, {text}, dimensions={{0}}", False)
    assert axes_of(groups_of(call, 8), AXES) == axes


@pytest.mark.parametrize("order", ["([4,2]T(1,0))", "(0,2,4,6,1,3,5,7)"])
def test_named_meshes_may_reorder_devices(order):
    text = f"replica_groups=mesh['a'=2,'b'=4], device_ids={order} {{'b'}}"
    call = hlo.Instruction("x", "all-reduce", (), "", text, False)
    np.testing.assert_array_equal(groups_of(call, 8), [[0, 2, 4, 6], [1, 3, 5, 7]])


ASYNC = """
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: f32[1,64]) -> (f32[1,64], f32[8,64]) {
  %p = f32[1,64]{1,0} parameter(0)
  %all-gather.1 = f32[8,64]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t = (f32[1,64]{1,0}, f32[8,64]{1,0}) custom-call(%p, %all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (p: f32[1,64], g: f32[8,64], x: f32[16,16]) -> (f32[16,16], f32[8,64]) {
  %p = f32[1,64]{1,0} parameter(0)
  %g = f32[8,64]{1,0} parameter(1)
  %all-gather.2 = f32[8,64]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
  %x = f32[16,16]{1,0} parameter(2)
  %product = f32[16,16]{1,0} convolution(%x, %x), dim_labels=bf_io->bf
  ROOT %t = (f32[16,16]{1,0}, f32[8,64]{1,0}) tuple(%product, %all-gather.2)
}

%all-reduce-scatter (y: f32[16,16]) -> f32[2,16] {
  %y = f32[16,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.3 = f32[16,16]{1,0} all-reduce(%y), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %part = f32[2,16]{1,0} dynamic-slice(%all-reduce.3, %zero, %zero), dynamic_slice_sizes={2,16}
}

ENTRY %main (p: f32[1,64], x: f32[16,16]) -> f32[2,16] {
  %p = f32[1,64]{1,0} parameter(0)
  %x = f32[16,16]{1,0} parameter(1)
  %begun = (f32[1,64]{1,0}, f32[8,64]{1,0}) fusion(%p), kind=kCustom, calls=%start
  %g = f32[8,64]{1,0} get-tuple-element(%begun), index=1
  %both = (f32[16,16]{1,0}, f32[8,64]{1,0}) fusion(%p, %g, %x), kind=kOutput, calls=%async_collective_fusion
  %y = f32[16,16]{1,0} get-tuple-element(%both), index=0
  %sent = (f32[16,16]{1,0}, f32[16,16]{1,0}, u32[]{:S(2)}) collective-permute-start(%y), channel_id=7,
    source_target_pairs={{0,4},{4,0}}
  %came = f32[16,16]{1,0} collective-permute-done(%sent)
  ROOT %out = f32[2,16]{1,0} fusion(%came), kind=kCustom, calls=%all-reduce-scatter
}
"""


@pytest.mark.parametrize("form", ["{{0,1,2,3},{4,5,6,7}}", "mesh['data'=2,'fsdp'=4] {'fsdp'}"])
def test_collectives_of_a_kind_are_found_with_what_they_give_and_who_takes_part(form):
    text = ASYNC.replace("replica_groups={{0,1,2,3},{4,5,6,7}}", f"replica_groups={form}")
    (array, members), *more = collectives(hlo.parse(text), "all-reduce", 8)
    assert (array.dtype, array.dims, more) == ("f32", (16, 16), [])
    np.testing.assert_array_equal(members, np.arange(8).reshape(2, 4))
    assert [a.dims for a, _ in collectives(hlo.parse(text), "collective-permute", 8)] == [(16, 16), (16, 16), ()]
    assert not list(collectives(hlo.parse(text), "all-to-all", 8))


def test_what_tpus_spread_over_fusions_counts_once():
    costs = costs_of(hlo.parse(ASYNC), AXES)
    assert costs.flops == 2 * 16**3 and not costs.unknown
    assert costs.transfers == Counter(
        {
            Transfer("all-gather", ("data", "fsdp"), 7 * 64 * 4): 1,
            Transfer("collective-permute", ("data",), 16 * 16 * 4): 1,
            Transfer("reduce-scatter", ("fsdp",), 16 * 16 * 4 * 3 // 4): 1,
        }
    )
    # The product reads and writes its matrix; each transfer reads what it sends and writes what it gives.
    product, gathered, passed, scattered = 2 * 1024, 256 + 8 * 256, 2 * 1024, 1024 + 1024
    assert costs.hbm_bytes == product + gathered + passed + scattered + 128


SLICES = """
HloModule slices

ENTRY %main (w: bf16[1,16,64]) -> bf16[1,32,64] {
  %w = bf16[1,16,64]{2,1,0} parameter(0)
  %token = token[] after-all()
  %send.1 = (bf16[1,16,64]{2,1,0}, u32[], token[]) send(%w, %token), channel_id=1, is_host_transfer=true,
    frontend_attributes={_xla_megascale_target={{100,200},{101,201}},_xla_megascale_transfer_type="ALL_GATHER"}
  %send-done.1 = token[] send-done(%send.1), channel_id=1
  %recv.1 = (bf16[1,32,64]{2,1,0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true,
    frontend_attributes={_xla_megascale_target={{100,200},{101,201}},_xla_megascale_transfer_type="ALL_GATHER"}
  %recv-done.1 = (bf16[1,32,64]{2,1,0}, token[]) recv-done(%recv.1), channel_id=2
  ROOT %whole = bf16[1,32,64]{2,1,0} get-tuple-element(%recv-done.1), index=0
}
"""


@pytest.mark.parametrize(
    ("ids", "axes"), [([100, 101, 200, 201], ("slice",)), ([100, 200, 101, 201], ("slice", "fsdp"))]
)
def test_what_hosts_carry_between_slices_is_of_the_slice_axis(ids, axes):
    costs = costs_of(hlo.parse(SLICES), {"slice": 2, "fsdp": 2}, ids)
    # In the second order, devices of one fsdp group live in several slices, and weights cross the slow network.
    assert costs.transfers == Counter({Transfer("all-gather", axes, 16 * 64 * 2): 1})


def test_hosts_may_name_devices_by_slices():
    text = SLICES.replace("{{100,200},{101,201}}", '"{1,2}x{0:1}"')
    costs = costs_of(hlo.parse(text), {"slice": 2, "fsdp": 2}, [100_000, 100_001, 200_000, 200_001])
    assert costs.transfers == Counter({Transfer("all-gather", ("slice",), 16 * 64 * 2): 1})


def test_types_of_tuples_layouts_and_memory_spaces():
    text = "(bf16[2,3]{1,0:T(8,128)(2,1)}, u4[5]{0}, /*index=2*/f32[]{:S(6)}, f8e4m3fn[4]{0:S(1)})"
    arrays = hlo.arrays_of(text)
    assert [array.bytes for array in arrays] == [12, 3, 4, 4]
    assert [array.hbm_bytes for array in arrays] == [12, 3, 0, 0]


SPLASH = """
HloModule attention

ENTRY %main (q: bf16[4,2048,128], k: bf16[2,2048,128], d: s8[1,2,2]) -> bf16[4,2048,128] {{
  %d = s8[1,2,2]{{2,1,0}} parameter(2)
  %q = bf16[4,2048,128]{{2,1,0}} parameter(0)
  %k = bf16[2,2048,128]{{2,1,0}} parameter(1)
  ROOT %splash_mha_{kind}_x.1 = bf16[4,2048,128]{{2,1,0}} custom-call(%d, %d, %q, %k, %k),
    custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"{name}_q{suffix}\\": 1024, \\"{name}_kv{suffix}\\": 1024{more}}}"
}}}}, metadata={{op_name="splash"}}
}}
"""


@pytest.mark.parametrize(
    ("kind", "suffix", "more", "products"),
    [("fwd", "", "", 2), ("dq", "_dq", "", 3), ("dkv", "_dkv", "", 4),
     ("dkv", "_dkv", ', \\"use_fused_bwd_kernel\\": true', 5)],
)  # fmt: skip
def test_attention_kernels_count_the_blocks_that_causal_order_leaves(kind, suffix, more, products):
    text = SPLASH.format(kind=kind, suffix=suffix, more=more, name="block")
    costs = costs_of(hlo.parse(text), {"fsdp": 1})
    assert costs.flops == products * 2 * 4 * 2048 * 2048 * 128 * 3 // 4  # three of four blocks
    assert not costs.unknown


CUDNN = """
HloModule attention

ENTRY %main (q: bf16[2,256,8,64], k: bf16[2,256,2,64]) -> bf16[2,8,256,64] {{
  %q = bf16[2,256,8,64]{{3,2,1,0}} parameter(0)
  %k = bf16[2,256,2,64]{{3,2,1,0}} parameter(1)
  ROOT %attention.1 = bf16[2,8,256,64]{{3,1,2,0}} custom-call(%q, %k, %k), custom_call_target="{target}",
    backend_config={{"cudnn_fmha_backend_config": {{"is_flash_attention": true, "mask_type": "{mask}"}}}}
}}
"""


@pytest.mark.parametrize(
    ("target", "mask", "flops"),
    [("__cudnn$fmhaScaleBiasSoftmax", "CAUSAL", 2 * 2 * 8 * 256 * 256 * 64),
     ("__cudnn$fmhaScaleBiasSoftmax", "NO_MASK", 2 * 2 * 2 * 8 * 256 * 256 * 64),
     ("__cudnn$fmhaScaleBiasSoftmaxBackward", "CAUSAL", 5 * 2 * 8 * 256 * 256 * 64)],
)  # fmt: skip
def test_attention_of_cudnn_is_counted(target, mask, flops):
    costs = costs_of(hlo.parse(CUDNN.format(target=target, mask=mask)), {"fsdp": 1})
    assert costs.flops == flops and not costs.unknown


MOSAIC = """
HloModule attention

ENTRY %main (q: bf16[2,256,8,64], k: bf16[2,512,2,64]) -> {results} {{
  %q = bf16[2,256,8,64]{{3,2,1,0}} parameter(0)
  %k = bf16[2,512,2,64]{{3,2,1,0}} parameter(1)
  ROOT %attention.1 = {results} custom-call(%q, %k, %k), custom_call_target="{target}",
    metadata={{op_name="jit(step)/transpose(jvp())/{scope}/tokamax:{{\\"op\\":1}}/vmap()/mpmd_map"}}
}}
"""
HEADS, SUMS = "bf16[2,256,8,64]{3,2,1,0}", "f32[2,8,256]{2,1,0}"


@pytest.mark.parametrize(
    ("results", "products"),
    [(f"({HEADS}, {SUMS}, {SUMS})", 2), (f"({HEADS}, {HEADS})", 4), (HEADS, 3)],
    ids=["forward", "keys and values", "queries"],
)  # fmt: skip
@pytest.mark.parametrize(("scope", "parts"), [("mosaic_attention", 1), ("mosaic_attention_causal", 2)])
def test_attention_of_tokamax_is_counted(results, products, scope, parts):
    text = MOSAIC.format(results=results, scope=scope, target="mosaic_gpu_v2")
    costs = costs_of(hlo.parse(text), {"fsdp": 1})
    assert costs.flops == products * 2 * 2 * 8 * 256 * 512 * 64 // parts and not costs.unknown
    assert costs_of(hlo.parse(text.replace(scope, "other")), {"fsdp": 1}).unknown


@pytest.mark.parametrize(("scope", "blocks"), [("splash", 7 + 8), ("context/balanced_queries/splash", 1 + 8)])
def test_a_part_of_a_row_is_the_last_one_unless_queries_are_balanced(scope, blocks):
    text = SPLASH.format(kind="fwd", suffix="", more="", name="block").replace('op_name="splash"', f'op_name="{scope}"')
    text = text.replace("bf16[2,2048,128]", "bf16[2,8192,128]").replace("s8[1,2,2]", "s8[1,2,8]")
    costs = costs_of(hlo.parse(text), {"context": 4})
    assert costs.flops == 2 * 2 * 4 * 2048 * 8192 * 128 * blocks // 16


def test_a_kernel_that_is_not_known_is_named():
    text = SPLASH.format(kind="fwd", suffix="", more="", name="block").replace("splash", "other")
    costs = costs_of(hlo.parse(text), {"fsdp": 1})
    assert costs.flops == 0 and costs.unknown == {"FLOPs of tpu_custom_call in other: counted as none"}


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")


RAGGED = """ENTRY %main (rows: bf16[64,32], matrices: bf16[4,32,16]) -> bf16[64,16] {{
  %sizes = s32[4]{{0}} constant({{16, 16, 16, 16}})
  %rows = bf16[64,32]{{1,0}} parameter(0)
  %matrices = bf16[{matrices}]{{2,1,0}} parameter(1)
  %others = bf16[64,16]{{1,0}} parameter(2)
  %plan.1 = s32[5]{{0}} custom-call(%sizes), custom_call_target="tpu_custom_call",
    metadata={{op_name="ragged-dot-metadata"}}
  ROOT %kernel.7 = bf16[{result}]{{1,0}} custom-call(%plan.1, %rows, %{second}),
    custom_call_target="tpu_custom_call", metadata={{op_name="jit(step)/{scope}"}}
}}
"""


@pytest.mark.parametrize(
    ("matrices", "result", "second", "scope"),
    [
        ("4,32,16", "64,16", "matrices", "ragged_dot_general/ragged-dot-none"),
        ("4,32,16", "64,16", "matrices", "jvp()/eval_jaxpr/jit(gmm)/pallas_call"),
        ("4,16,32", "64,16", "matrices", "transpose(jvp(jit(gmm)))/pallas_call"),
        ("4,32,16", "4,32,16", "others", "transpose(jvp(jit(tgmm)))/pallas_call"),
    ],
)
def test_a_kernel_for_experts_multiplies_each_row_once(matrices, result, second, scope):
    text = RAGGED.format(matrices=matrices, result=result, second=second, scope=scope)
    costs = costs_of(hlo.parse(text), {"fsdp": 1})
    assert costs.flops == 2 * 64 * 32 * 16 and not costs.unknown


def test_a_kernel_for_experts_reads_the_matrices_of_one_layer_of_a_stack():
    sizes = {"matrices": "4,32,16", "result": "64,16", "second": "matrices"}
    moved = [
        costs_of(hlo.parse(RAGGED.format(**sizes, scope=f"{scope}jit(gmm)/pallas_call")), {"fsdp": 1}).hbm_bytes
        for scope in ("", "one_layer_of_4/")
    ]
    assert moved[0] - moved[1] == 3 * 32 * 16 * 2


def test_rows_that_no_expert_takes_are_not_multiplied():
    text = RAGGED.format(matrices="4,32,16", result="64,16", second="matrices", scope="jit(gmm)/pallas_call")
    assert costs_of(hlo.parse(text), {"fsdp": 1}, filled=0.25).flops == 2 * 16 * 32 * 16
    plain = """ENTRY %main (rows: bf16[64,32], matrices: bf16[4,32,16], sizes: s32[4]) -> bf16[64,16] {
  %rows = bf16[64,32]{1,0} parameter(0)
  %matrices = bf16[4,32,16]{2,1,0} parameter(1)
  %sizes = s32[4]{0} parameter(2)
  ROOT %y = bf16[64,16]{1,0} ragged-dot(%rows, %matrices, %sizes), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""
    assert costs_of(hlo.parse(plain), {"fsdp": 1}, filled=0.25).flops == 2 * 16 * 32 * 16


OFFLOADED = """ENTRY %main (kept: bf16[2,8,64], x: bf16[1,8,64], w: bf16[8,64]) -> bf16[1,8,64] {
  %kept = bf16[2,8,64]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)
  %x = bf16[1,8,64]{2,1,0} parameter(1)
  %at = s32[]{:T(128)} constant(1)
  %put = ((bf16[2,8,64]{2,1,0:S(5)}, bf16[1,8,64]{2,1,0}, s32[]), bf16[2,8,64]{2,1,0:S(5)}, u32[]{:S(2)})
    dynamic-update-slice-start(%kept, %x, %at, %at, %at)
  %there = bf16[2,8,64]{2,1,0:S(5)} dynamic-update-slice-done(%put)
  %get = ((bf16[2,8,64]{2,1,0:S(5)}, s32[]), bf16[1,8,64]{2,1,0}, u32[]{:S(2)})
    dynamic-slice-start(%there, %at, %at, %at), dynamic_slice_sizes={1,8,64}
  %here = bf16[1,8,64]{2,1,0} dynamic-slice-done(%get)
  %w = bf16[8,64]{1,0} parameter(2)
  %out = (bf16[8,64]{1,0:S(5)}, bf16[8,64]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %near = (bf16[8,64]{1,0:S(1)}, bf16[8,64]{1,0}, u32[]{:S(2)}) copy-start(%w)
  ROOT %copy = bf16[1,8,64]{2,1,0} copy(%here)
}
"""


def test_what_travels_to_the_hosts_memory_and_back_is_counted_apart():
    costs = costs_of(hlo.parse(OFFLOADED), {"fsdp": 1})
    assert costs.host_bytes == 3 * 8 * 64 * 2  # put there, fetched back, and one copy; the other stays on the chip
    assert not costs.transfers


def test_what_a_sparse_core_does_ends_where_it_ends():
    text = """%inner (a: s32[8]) -> s32[8] {
  %a = s32[8]{0} parameter(0)
  ROOT %copy.1 = s32[8]{0} copy(%a)
}, execution_thread="sparsecore"

%after (b: s32[8]) -> s32[8] {
  %b = s32[8]{0} parameter(0)
  ROOT %copy.2 = s32[8]{0} copy(%b)
}

ENTRY %main (c: s32[8]) -> s32[8] {
  %c = s32[8]{0} parameter(0)
  ROOT %both = s32[8]{0} fusion(%c), kind=kLoop, calls=%after
}
"""
    module = hlo.parse(text)
    assert {name: len(c.instructions) for name, c in module.computations.items()} == {"inner": 2, "after": 2, "main": 2}
    assert costs_of(module, {"fsdp": 1}).hbm_bytes == 2 * 8 * 4
