import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import few_variants, randomise
from tiny_flows import condition_of
from torch.distributions import Normal

from itarflow.flow import TARFlow, nll_per_dim, patchify, unpatchify
from itarflow.flow.block import AutoregressiveBlock
from itarflow.flow.density import updated_prior_variance
from itarflow.flow.transformer import Attention, Layer
from itarflow.inverse import Guidance, Jacobi, sequential


def one_by_one(inputs):
    """The inputs of a batch as batches of one."""
    return [[None if v is None else v[i : i + 1] for v in inputs] for i in range(len(inputs.images))]


# Density


@few_variants
def test_an_image_does_not_see_the_rest_of_its_batch(flow, make_inputs):
    flow.double()
    inputs = make_inputs(flow)
    alone = [flow.log_prob(*one) for one in one_by_one(inputs)]
    torch.testing.assert_close(flow.log_prob(*inputs), torch.cat(alone))


@few_variants
def test_log_prob_is_the_priors_density_times_the_change_of_volume(flow, make_inputs):
    inputs = make_inputs(flow)
    z, log_det = flow(*inputs)
    prior = Normal(torch.zeros(flow.z_shape), flow.prior_variance.sqrt())
    assert (flow.prior_variance != 1).any() == flow.config.volume_preserving
    torch.testing.assert_close(flow.log_prob(*inputs), prior.log_prob(z).sum(dim=(1, 2)) + log_det)


@pytest.mark.parametrize(("in_channels", "volume_preserving"), [(1, True), (2, False)])
def test_density_integrates_to_one(make_flow, in_channels, volume_preserving):
    flow = make_flow(
        image_size=1,
        in_channels=in_channels,
        patch_size=1,
        learned_first_token=True,
        volume_preserving=volume_preserving,
        input_scale=0.7,
    ).double()
    axis = torch.linspace(-15, 15, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * in_channels).view(-1, in_channels, 1, 1)
    density = flow.log_prob(grid, torch.full((len(grid),), 2), 0.3).exp()
    torch.testing.assert_close(density.sum() * 0.1**in_channels, torch.tensor(1.0, dtype=torch.float64))


def test_a_fresh_flow_is_the_identity_with_the_density_of_gaussian_noise(variant, make_flow, make_inputs):
    flow = make_flow(fresh=True, **variant)
    inputs = make_inputs(flow)
    z, log_det = flow(*inputs)
    scale, dims = flow.config.input_scale, inputs.images[0].numel()
    torch.testing.assert_close(z, patchify(inputs.images, flow.patch_sizes[-1]) * scale)
    torch.testing.assert_close(log_det, torch.full((3,), dims * math.log(scale)))
    expected = Normal(0.0, 1 / flow.config.input_scale).log_prob(inputs.images).sum(dim=(1, 2, 3))
    torch.testing.assert_close(flow.log_prob(*inputs), expected)


# Inverse


def test_inverse_undoes_forward(flow, make_inputs):
    images, labels, noise_level = make_inputs(flow)
    restored = flow.inverse(flow(images, labels, noise_level).z, labels, noise_level)
    torch.testing.assert_close(restored, images, atol=1e-4, rtol=0)


def test_samples_of_a_seed_do_not_depend_on_the_default_type(make_flow, make_inputs):
    flow = make_flow()
    _, labels, noise_level = make_inputs(flow)

    def sample():
        z = flow.sample_prior(3, torch.Generator().manual_seed(0))
        solvers = [Jacobi(window=2, tolerance=0.0), sequential]
        return flow.inverse(z, labels, noise_level, guidance=Guidance(weight=1.5), solver=solvers)

    expected = sample()
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(sample(), expected, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


# The layers, and their cached form


def test_another_activation_is_inverted_too(make_flow, make_inputs):
    flow = make_flow().double()
    for layer in (module for module in flow.modules() if isinstance(module, Layer)):
        layer.mlp[1] = torch.nn.SiLU()
    images, labels, noise_level = make_inputs(flow)
    z, _ = flow(images, labels, noise_level)
    torch.testing.assert_close(flow.inverse(z, labels, noise_level), images)


def changed_layer(self, x, temperature=None, rotation=None):
    x = x + self.attention(x, temperature)  # without its norm
    return x + self.mlp(self.mlp_norm(x))


def test_a_layer_whose_cached_form_is_another_is_noticed(make_flow, make_inputs, monkeypatch):
    flow = make_flow(seed=3)
    randomise(flow, std=0.3)
    _, labels, noise_level = make_inputs(flow)
    z = flow.sample_prior(3, torch.Generator().manual_seed(0))
    flow.inverse(z, labels, noise_level)
    monkeypatch.setattr(Layer, "forward", changed_layer)
    flow.inverse(z, labels, noise_level)  # it was looked at once
    with pytest.raises(RuntimeError, match=r"inverse is not that of the flow.*pack_layers"):
        opened_again(flow).inverse(z, labels, noise_level)


def opened_again(flow):
    """The flow as another process opens it."""
    opened = TARFlow.from_config(flow.config)
    opened.load_state_dict(flow.state_dict())
    return opened


@pytest.mark.parametrize("how", ["bfloat16", "compiled"])
def test_low_precision_and_compiled_layers_are_not_compared(make_flow, make_inputs, monkeypatch, how):
    flow = make_flow()
    _, labels, noise_level = make_inputs(flow)
    if how == "bfloat16":
        flow.to(torch.bfloat16)
    else:
        next(module for module in flow.modules() if isinstance(module, Layer)).compile(backend="eager")
    asked = []
    monkeypatch.setattr(AutoregressiveBlock, "check_decoding", lambda *_: asked.append(1))
    z = flow.sample_prior(3, torch.Generator().manual_seed(0))
    flow.inverse(z, labels, noise_level)
    assert not asked
    for _ in range(2):
        opened_again(flow.float()).inverse(z, labels, noise_level)
    assert len(asked) == 4  # two blocks each


@few_variants
def test_forward_undoes_inverse(flow, make_inputs):
    _, labels, noise_level = make_inputs(flow)
    z = flow.sample_prior(3, torch.Generator().manual_seed(0))
    restored = flow(flow.inverse(z, labels, noise_level), labels, noise_level).z
    torch.testing.assert_close(restored, z, atol=1e-4, rtol=0)


def test_inverse_records_no_gradients(make_flow):
    flow = make_flow()
    assert flow(torch.zeros(2, 2, 4, 4), None, 0.3).z.requires_grad
    assert not flow.inverse(torch.zeros(2, 4, 8), None, 0.3).requires_grad


@pytest.mark.parametrize("variant", ["small_patches_last", "unconditional", "all_at_once"], indirect=True)
def test_trajectory_goes_from_z_through_every_block_to_the_images(flow, make_inputs):
    _, labels, noise_level = make_inputs(flow)
    z = flow.sample_prior(3, torch.Generator().manual_seed(0))
    path = flow.inverse(z, labels, noise_level, return_trajectory=True)
    assert path.shape == (len(flow.blocks) + 1, 3, *flow.image_shape)
    torch.testing.assert_close(path[0], unpatchify(z, flow.patch_sizes[-1], 4) / flow.config.input_scale)
    torch.testing.assert_close(path[-1], flow.inverse(z, labels, noise_level))
    for before, after, block, patch in zip(path, path[1:], flow.blocks[::-1], flow.patch_sizes[::-1], strict=False):
        condition = condition_of(flow, block, labels, noise_level)
        mapped = block(patchify(after * flow.config.input_scale, patch), condition).z
        torch.testing.assert_close(mapped, patchify(before * flow.config.input_scale, patch), atol=1e-4, rtol=1e-4)


def test_two_threads_sample_from_one_model_at_once(make_flow):
    flow = make_flow(num_layers=(1, 1, 1), patch_size=1)
    z = flow.sample_prior(2, torch.Generator().manual_seed(0))
    tasks = [
        (torch.tensor([0, 1]), 0.1, Guidance(weight=2.0, temperature=0.7)),
        (torch.tensor([2, -1]), 0.5, Guidance(weight=1.0, rule="gaussian", blocks=1)),
    ]
    barrier = threading.Barrier(2)

    def sample(labels, noise_level, guidance):
        barrier.wait()
        return [flow.inverse(z, labels, noise_level, guidance=guidance) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(sample, *zip(*tasks, strict=True)))
    for results, (labels, noise_level, guidance) in zip(together, tasks, strict=True):
        alone = flow.inverse(z, labels, noise_level, guidance=guidance)
        assert all(torch.equal(result, alone) for result in results)


# Inputs


@few_variants
def test_inputs_are_never_mutated(flow, make_inputs):
    inputs = make_inputs(flow)
    z = flow.sample_prior(3, torch.Generator().manual_seed(0))
    originals = copy.deepcopy((inputs, z))
    flow(*inputs)
    flow.log_prob(*inputs)
    flow.inverse(z, *inputs[1:], guidance=Guidance(weight=1.0, temperature=0.5))
    torch.testing.assert_close((inputs, z), originals, atol=0, rtol=0)


def test_no_labels_are_null_labels(make_flow, make_inputs):
    flow = make_flow()
    images, _, noise_level = make_inputs(flow)
    null = torch.full((3,), flow.null_label)
    assert torch.equal(flow.log_prob(images, None, noise_level), flow.log_prob(images, null, noise_level))
    assert not torch.equal(flow.log_prob(images, None, noise_level), flow.log_prob(images, null + 1, noise_level))


@pytest.mark.parametrize("noise_level", [torch.full((3,), 0.2), torch.tensor(0.2), torch.tensor([0.2])], ids=str)
def test_one_noise_level_stands_for_all(make_flow, make_inputs, noise_level):
    flow = make_flow()
    images, labels, _ = make_inputs(flow)
    assert torch.equal(flow.log_prob(images, labels, noise_level), flow.log_prob(images, labels, 0.2))
    assert not torch.equal(flow.log_prob(images, labels, noise_level), flow.log_prob(images, labels, 0.3))


def test_a_flow_without_noise_conditioning_ignores_the_noise_level(make_flow, make_inputs):
    flow = make_flow(noise_conditioned=False)
    images, labels, _ = make_inputs(flow)
    assert torch.equal(flow.log_prob(images, labels, 0.2), flow.log_prob(images, labels))


@pytest.mark.parametrize("edge", [0.1, 0.3])
def test_edges_of_the_trained_range_are_inside_in_float32(make_flow, make_inputs, edge):
    flow = make_flow(noise_range=(0.1, 0.3))
    images, labels, _ = make_inputs(flow)
    assert flow.log_prob(images, labels, torch.full((3,), edge)).isfinite().all()


def test_samples_of_the_prior_have_its_variance(make_flow):
    flow = make_flow(volume_preserving=True)
    z = flow.sample_prior(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.var(dim=0), flow.prior_variance, atol=0, rtol=0.06)


def test_a_sample_of_the_prior_depends_on_its_own_generator_alone(make_flow):
    flow = make_flow(volume_preserving=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    z = flow.sample_prior(3, generators)
    assert torch.equal(z[1:2], flow.sample_prior(1, torch.Generator().manual_seed(6)))
    assert not torch.equal(z[0], z[1])


def test_the_prior_draws_from_the_global_generator_if_none_is_given(make_flow):
    flow = make_flow()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        z = flow.sample_prior(2, None)
    assert torch.equal(z, flow.sample_prior(2, torch.Generator().manual_seed(3)))


# Training


def test_every_parameter_gets_a_gradient(flow, make_inputs):
    """Where a block has one token, there is nothing for its transformer to read."""
    nll_per_dim(flow(*make_inputs(flow))).sum().backward()
    used = ("first_token", "class_embedding", "noise_embedding") if flow.config.learned_first_token else ()
    idle = {
        f"blocks.{index}.{name}"
        for index, block in enumerate(flow.blocks)
        for name, _ in block.named_parameters()
        if block.num_tokens == 1 and not name.startswith(used)
    }
    assert {name for name, p in flow.named_parameters() if p.grad is None or not p.grad.any()} == idle


def test_prior_variance_moves_towards_the_mean_square_without_a_gradient():
    z = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]], requires_grad=True)
    old = torch.tensor([[1.0], [4.0]])
    updated = updated_prior_variance(old, z, rate=0.25)
    torch.testing.assert_close(updated, torch.tensor([[0.75 * 1 + 0.25 * 5], [0.75 * 4 + 0.25 * 2]]))
    assert not updated.requires_grad
    assert old.tolist() == [[1.0], [4.0]]


@few_variants
def test_training_and_evaluation_mode_agree(flow, make_inputs):
    inputs = make_inputs(flow)
    assert torch.equal(flow.train().log_prob(*inputs), flow.eval().log_prob(*inputs))


def gradients(flow, inputs):
    flow.zero_grad()
    flow.log_prob(*inputs).sum().backward()
    return {name: p.grad.clone() for name, p in flow.named_parameters() if p.grad is not None}


@few_variants
def test_gradient_checkpointing_changes_no_gradient(flow, make_inputs):
    inputs = make_inputs(flow)
    expected = gradients(flow, inputs)
    flow.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(flow, inputs), expected)


def test_gradient_checkpointing_runs_every_layer_twice(make_flow, make_inputs):
    flow = make_flow(shared_layers=1, num_layers=(2, 3))
    inputs = make_inputs(flow)
    calls = []
    for module in flow.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda *_: calls.append(1))
    gradients(flow, inputs)
    once = len(calls)
    flow.enable_gradient_checkpointing()
    gradients(flow, inputs)
    assert (once, len(calls) - once) == (2 + 3, 2 * (2 + 3))


# Precision


@few_variants
def test_half_precision_weights_leave_the_flow_in_float32(flow, make_inputs):
    inputs = make_inputs(flow)
    expected = flow(*inputs)
    half = flow.to(torch.bfloat16)
    z, log_det = half(*inputs)
    assert (z.dtype, log_det.dtype, half.log_prob(*inputs).dtype) == (torch.float32,) * 3
    torch.testing.assert_close((z, log_det), tuple(expected), atol=0.1, rtol=0.02)
    torch.testing.assert_close(half.inverse(z, *inputs[1:]), inputs.images, atol=0.1, rtol=0)


@few_variants
def test_autocast_leaves_the_flow_in_float32(flow, make_inputs):
    inputs = make_inputs(flow)
    expected = flow(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = flow(*inputs)
        restored = flow.inverse(z, *inputs[1:])
    assert (z.dtype, log_det.dtype, restored.dtype) == (torch.float32,) * 3
    torch.testing.assert_close((z, log_det), tuple(expected), atol=0.1, rtol=0.02)
    torch.testing.assert_close(restored, inputs.images, atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_widened_first(make_flow, make_inputs, dtype):
    flow = make_flow(input_scale=0.6)
    images, labels, noise_level = make_inputs(flow)
    images = images.to(dtype)
    assert torch.equal(flow(images, labels, noise_level).z, flow(images.float(), labels, noise_level).z)
    z = flow.sample_prior(3, torch.Generator().manual_seed(0)).to(dtype)
    restored = flow.inverse(z, labels, noise_level)
    assert restored.dtype == torch.float32
    assert torch.equal(restored, flow.inverse(z.float(), labels, noise_level))


# Copies


@pytest.mark.parametrize("variant", ["small_patches_last", "no_noise_level", "all_at_once"], indirect=True)
def test_a_saved_flow_loads_bit_equal(flow, make_inputs, tmp_path):
    inputs = make_inputs(flow)
    flow.save_pretrained(tmp_path)
    loaded = TARFlow.from_pretrained(tmp_path)
    assert torch.equal(loaded.log_prob(*inputs), flow.log_prob(*inputs))
    assert loaded.patch_sizes == flow.patch_sizes

    def values(config):
        return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}

    assert values(loaded.config) == values(flow.config)


def test_a_loaded_flow_saves_again(make_flow, make_inputs, tmp_path):
    flow = make_flow(channels=(8, 12), patch_size=(1, 2), noise_range=(0.01, 0.5))
    flow.save_pretrained(tmp_path / "first")
    TARFlow.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    loaded = TARFlow.from_pretrained(tmp_path / "second")
    inputs = make_inputs(flow)
    assert torch.equal(loaded.log_prob(*inputs), flow.log_prob(*inputs))
    with pytest.raises(ValueError, match=r"outside \[0\.01, 0\.5\]"):
        loaded.log_prob(inputs.images, inputs.labels, 0.6)


@few_variants
def test_a_flow_is_rebuilt_from_its_config(flow, make_inputs):
    rebuilt = TARFlow.from_config(flow.config)
    rebuilt.load_state_dict(flow.state_dict())
    inputs = make_inputs(flow)
    assert torch.equal(rebuilt.log_prob(*inputs), flow.log_prob(*inputs))


@few_variants
def test_a_copy_is_equal_and_shares_nothing(flow, make_inputs):
    inputs = make_inputs(flow)
    expected = flow.log_prob(*inputs)
    copied = copy.deepcopy(flow)
    assert torch.equal(copied.log_prob(*inputs), expected)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.fill_(0.1)
    assert torch.equal(flow.log_prob(*inputs), expected)
    assert not torch.equal(copied.log_prob(*inputs), expected)


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 3}, r"patch_size 3 .*image_size 4.*\[1, 2, 4\]"),
        ({"patch_size": (2, 3)}, "patch_size 3 "),
        ({"patch_size": (2, 2, 2)}, r"patch_size .*3 .*2 blocks"),
        ({"channels": (8,)}, "channels .*1 .*2 blocks"),
        ({"channels": 10}, "channels 10 .*head_dim 4"),
        ({"channels": (8, 12), "shared_layers": 1}, r"shared_layers=1 .*\(8, 12\)"),
        ({"num_layers": ()}, r"num_layers is \(\)"),
        ({"num_layers": (1, 0)}, "num_layers is 0; expected a whole number from 1 "),
        ({"image_size": 0}, "image_size is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"channels": 0}, "channels is 0"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"shared_layers": -1}, "shared_layers is -1"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
        ({"input_scale": 0.0}, r"input_scale is 0\.0.*>= 1e-18 "),
        ({"input_scale": math.inf}, "input_scale is inf.*finite"),
        ({"input_scale": math.nan}, "input_scale is nan"),
        ({"noise_range": (0.3, 0.1)}, r"noise_range is \(0\.3, 0\.1\).*t_min <= t_max"),
        ({"noise_range": (0.0, 0.1)}, r"a level of noise_range is 0\.0"),
        ({"noise_range": (0.1,)}, r"noise_range is \(0\.1,\).*\(t_min, t_max\)"),
        ({"noise_range": (1e-320, 0.1)}, "noise_range is 1e-320"),  # 0 in float32
        ({"noise_range": (0.1, 1e300)}, r"noise_range is 1e\+300"),
        ({"noise_range": {"t": 1}}, "noise_range is {'t': 1}"),
        ({"num_layers": 3}, "num_layers is 3; expected one number a block"),
        ({"num_layers": (10**6,)}, "num_layers is 1000000; .* 10,000"),
        ({"num_layers": (10**26, 1)}, "num_layers is 10+; "),
        ({"num_layers": (1,) * 10**5}, "100,000 layers.*at most 10,000.*num_layers"),
        ({"shared_layers": 10**30}, "shared_layers is 10+; "),
        ({"image_size": 10**26}, "image_size is 10+; "),
        ({"image_size": "4"}, "image_size is '4'; expected a whole number"),
        ({"image_size": 4.0}, r"image_size is 4\.0"),
        ({"patch_size": None}, "patch_size is None"),
        ({"channels": 2 * 10**9}, "channels is 2000000000"),
        ({"channels": 2**20}, r"parameters; .* channels=\(1048576, 1048576\)"),
        ({"mlp_ratio": 2 * 10**9}, "mlp_ratio is 2000000000"),
        ({"num_classes": 10**26}, "num_classes is 10+; "),
        ({"num_classes": 2**20, "channels": 2**20}, r"e\+13 parameters.*num_classes=1048576"),
        ({"num_classes": 2**20 + 1}, "num_classes is 1048577; .* 1,048,576"),
        ({"in_channels": 10**9}, "in_channels is 1000000000"),
        ({"noise_conditioned": "no"}, "noise_conditioned is 'no'; expected True or False"),
        ({"patch_size": 4}, "patch_size 4 is image_size 4.*smaller patch_size, or set start_token"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(make_flow, changes, words):
    with pytest.raises(ValueError, match=words):
        make_flow(**changes)


CALLS = {
    "forward": lambda flow, labels, level: flow(torch.zeros(2, 2, 4, 4), labels, level),
    "log_prob": lambda flow, labels, level: flow.log_prob(torch.zeros(2, 2, 4, 4), labels, level),
    "inverse": lambda flow, labels, level: flow.inverse(torch.zeros(2, 4, 8), labels, level),
}


@pytest.mark.parametrize(
    ("labels", "noise_level", "words"),
    [
        (torch.tensor([0, 3]), 0.2, r"labels \[3\] .*0 \.\. 2"),
        (torch.tensor([-2, 0]), 0.2, r"labels \[-2\] "),
        (torch.tensor([0]), 0.2, r"labels .*\(1,\).*\(2,\) int64"),
        (torch.tensor([[0], [1]]), 0.2, r"labels .*\(2, 1\)"),
        (torch.tensor([0.0, 1.0]), 0.2, r"torch\.float32.*\(2,\) int64"),
        (None, None, "noise_level is missing"),
        (None, 0.0, r"noise_level is \[0\.0\].*> 0"),
        (None, torch.tensor([0.2, -0.1]), r"noise_level is \[0\.2.*-0\.1.*> 0"),
        (None, math.inf, r"noise_level is \[inf\]"),
        (None, math.nan, r"noise_level is \[nan\]"),
        (None, torch.full((3,), 0.2), r"noise_level .*\(3,\).*\(2,\)"),
    ],
    ids=str,
)
def test_wrong_labels_and_noise_levels_are_refused(make_flow, labels, noise_level, words):
    flow = make_flow()
    for call in CALLS.values():
        with pytest.raises(ValueError, match=words):
            call(flow, labels, noise_level)


def test_labels_for_a_flow_without_classes_are_refused(make_flow):
    for call in CALLS.values():
        with pytest.raises(ValueError, match=r"num_classes=0.*labels=None"):
            call(make_flow(num_classes=0), torch.tensor([0, 1]), 0.2)


@pytest.mark.parametrize(
    ("call", "level"), [("log_prob", 0.05), ("inverse", 0.31), ("log_prob", torch.tensor([0.2, 0.4]))], ids=str
)
def test_noise_levels_outside_the_trained_range_are_refused(make_flow, call, level):
    with pytest.raises(ValueError, match=r"outside \[0\.1, 0\.3\]"):
        CALLS[call](make_flow(noise_range=(0.1, 0.3)), None, level)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 2, 4, 5), (2, 4, 4)], ids=str)
def test_images_of_another_shape_are_refused(make_flow, shape):
    with pytest.raises(ValueError, match=r"images .*\(2, .*\(B, 2, 4, 4\)"):
        make_flow()(torch.zeros(shape), None, 0.2)


@pytest.mark.parametrize("shape", [(2, 4, 7), (2, 5, 8), (4, 8), (2, 2, 4, 4)], ids=str)
def test_z_of_another_shape_is_refused(make_flow, shape):
    with pytest.raises(ValueError, match=r"z has shape \(.*\(B, 4, 8\)"):
        make_flow().inverse(torch.zeros(shape), None, 0.2)


def test_a_wrong_number_of_generators_is_refused(make_flow):
    with pytest.raises(ValueError, match=r"2 generators .* 3 samples"):
        make_flow().sample_prior(3, [torch.Generator(), torch.Generator()])


def test_a_flow_of_one_noise_level_refuses_others(make_flow, make_inputs):
    flow = make_flow(noise_conditioned=False, noise_range=(0.05, 0.05))
    images, labels, _ = make_inputs(flow)
    assert flow.log_prob(images, labels, 0.05).isfinite().all()
    assert flow.log_prob(images, labels).isfinite().all()
    with pytest.raises(ValueError, match=r"3\.0.* \[0\.05, 0\.05\]"):
        flow.log_prob(images, labels, 3.0)


def test_guiding_a_block_that_is_not_there_is_refused(make_flow, make_inputs):
    flow = make_flow()
    _, labels, noise_level = make_inputs(flow)
    z = flow.sample_prior(len(labels), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"blocks \(0, 9\) .* 2"):
        flow.inverse(z, labels, noise_level, guidance=Guidance(weight=1.0, blocks=(0, 9)))
