"""The equations of the two papers, in their order, each written out by hand and compared with the library.

TARFlow is arXiv 2412.06329, iTARFlow arXiv 2604.20041; docs/method.md says which function holds which equation. All
is in float64, with tiny random networks, of every kind where the equation is about the flow itself.

Tokens are (B, N, D); x_i is token i and x_{<i} are the tokens before it, in a block's own order.
"""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_flows import condition_of, first_sample
from torch.autograd.functional import jacobian
from torch.distributions import Normal

from itarflow.codec import Posterior
from itarflow.data import DataConfig
from itarflow.denoisers import DenoiseScheduler, DiffusionDenoiser, FlowDenoiser, denoise
from itarflow.denoisers.ode import noise_levels
from itarflow.evaluation.likelihood.bounds import Noise, likelihoods
from itarflow.flow import NoiseConfig, log_density, nll_per_dim, patchify, unpatchify
from itarflow.flow.embedding import NoiseLevelEmbedding
from itarflow.flow.noise import (
    dequantise,
    draw_noise_level,
    lognormal_level,
    loss_weight,
    quadratic_level,
    uniform_level,
)
from itarflow.flow.transformer import Attention
from itarflow.inverse import Guidance, guide, sequential
from itarflow.presets import ModelConfig
from itarflow.training import Recipe
from itarflow.training.objective import Draws, training_losses

close = torch.testing.assert_close


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own_order(block, tokens):
    """Raster order to the block's own order, or back."""
    return tokens.flip(1) if block.reverse else tokens


def mu_alpha(block, before, condition):
    """mu_i(x_{<i}) and alpha_i(x_{<i}), each (B, D), from x_{<i} (B, i, D)."""
    if before.shape[1] == 0:  # zeros, unless the first token is learned
        return [values[:, 0] for values in block.first_affine(condition)]
    return [values[:, -1] for values in block.affine_at(before, condition)]


def blocks_of(flow, make_inputs):
    """Each block with a condition for three samples and random tokens in raster order."""
    _, labels, noise_level = make_inputs(flow)
    for block in flow.blocks:
        tokens = randn(3, block.num_tokens, block.proj_in.in_features)
        yield block, condition_of(flow, block, labels, noise_level), tokens


@pytest.fixture
def plain(make_flow):
    """Three blocks, with labels and noise level."""
    return make_flow(num_layers=(1, 2, 1)).double()


# TARFlow, section 2.1: normalizing flows


def test_eq_1_change_of_variables(flow, make_inputs):
    """log p(x) = log p_0(f(x)) + log |det df(x)/dx|"""
    images, labels, noise_level = make_inputs(flow.double())
    output = flow(images, labels, noise_level)
    prior = Normal(torch.zeros_like(flow.prior_variance), flow.prior_variance.sqrt())
    # A sum over the batch has the Jacobian of each image, since none sees another: (N, D, B, C, H, W).
    matrices = jacobian(lambda x: flow(x, labels, noise_level).z.sum(dim=0), images).flatten(3).flatten(0, 1)
    log_det = torch.linalg.slogdet(matrices.transpose(0, 1)).logabsdet
    close(output.log_det, log_det)
    expected = prior.log_prob(output.z).sum(dim=(1, 2)) + log_det
    close(log_density(output, flow.prior_variance), expected)
    close(flow.log_prob(images, labels, noise_level), expected)


def test_eq_2_maximum_likelihood_under_a_unit_gaussian(make_flow, make_inputs):
    """1/2 ||f(x)||^2 - log |det df(x)/dx| is -log p(x) but for a constant."""
    flow = make_flow(input_scale=0.6).double()
    output = flow(*make_inputs(flow))
    dims = output.z[0].numel()
    loss = 0.5 * output.z.square().sum(dim=(1, 2)) - output.log_det
    close(nll_per_dim(output), loss / dims)
    close(loss, -flow.log_prob(*make_inputs(flow)) - dims / 2 * math.log(2 * math.pi))


# TARFlow, section 2.2: block autoregressive flows


def test_section_2_2_blocks_follow_each_other_and_flip_the_tokens(plain, make_inputs):
    """z^T = f(x) = (f^{T-1} o ... o f^0)(x), where f^t flips its input first if t > 0."""
    images, labels, noise_level = make_inputs(plain)
    z = patchify(images, 2)
    for t, block in enumerate(plain.blocks):
        z = z.flip(1) if t > 0 else z  # pi^t: what this block reads is in its own order
        z = own_order(block, block(own_order(block, z), condition_of(plain, block, labels, noise_level)).z)
    close(plain(images, labels, noise_level).z, own_order(plain.blocks[-1], z))


def test_eq_3_a_block_maps_each_token_by_those_before(flow, make_inputs):
    """z_0 = x_0,  z_i = (x_i - mu_i(x_{<i})) exp(-alpha_i(x_{<i}))"""
    for block, condition, tokens in blocks_of(flow.double(), make_inputs):
        x = own_order(block, tokens)
        z = torch.zeros_like(x)
        for i in range(block.num_tokens):
            mu, alpha = mu_alpha(block, x[:, :i], condition)
            z[:, i] = (x[:, i] - mu) * torch.exp(-alpha)
        close(block(tokens, condition).z, own_order(block, z))
        assert flow.config.learned_first_token or flow.config.start_token or torch.equal(z[:, 0], x[:, 0])


def test_eq_4_the_inverse_is_one_token_after_another(flow, make_inputs):
    """x_0 = z_0,  x_i = z_i exp(alpha_i(x_{<i})) + mu_i(x_{<i})"""
    for block, condition, tokens in blocks_of(flow.double(), make_inputs):
        z = own_order(block, tokens)
        x = torch.zeros_like(z)
        for i in range(block.num_tokens):
            mu, alpha = mu_alpha(block, x[:, :i], condition)
            x[:, i] = z[:, i] * torch.exp(alpha) + mu
        with torch.no_grad():
            close(block.inverse(tokens, condition, None, Guidance(), sequential), own_order(block, x))
        close(block(own_order(block, x), condition).z, tokens)


def test_eq_5_log_determinant_of_a_block(flow, make_inputs):
    """log |det dz/dx| = -sum_i sum_j alpha_i(x_{<i})_j"""
    for block, condition, tokens in blocks_of(flow.double(), make_inputs):
        x = own_order(block, tokens)
        alpha = [mu_alpha(block, x[:, :i], condition)[1] for i in range(block.num_tokens)]
        expected = -torch.stack(alpha).sum(dim=(0, 2))
        close(block(tokens, condition).log_det, expected)
        one = first_sample(condition)
        matrix = jacobian(lambda x, block=block, one=one: block(x, one).z, tokens[:1])
        close(torch.linalg.slogdet(matrix.reshape(x[0].numel(), -1)).logabsdet, expected[0])


def test_eq_6_the_loss(plain, make_inputs):
    """1/2 ||z^T||^2 + sum_t sum_i sum_j alpha^t_i(x^t_{<i})_j"""
    images, labels, noise_level = make_inputs(plain)
    x, loss = patchify(images, 2), torch.zeros(3, dtype=torch.float64)
    for block in plain.blocks:
        condition = condition_of(plain, block, labels, noise_level)
        for i in range(block.num_tokens):
            loss = loss + mu_alpha(block, own_order(block, x)[:, :i], condition)[1].sum(dim=1)
        x = block(x, condition).z
    loss = loss + 0.5 * x.square().sum(dim=(1, 2))
    close(nll_per_dim(plain(images, labels, noise_level)), loss / images[0].numel())


# TARFlow, section 2.3: patches are tokens


def test_section_2_3_an_image_is_a_sequence_of_patches():
    """N = H W / p^2 tokens of D = C p^2 values, in raster order."""
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    tokens = patchify(images, 2)
    assert tokens.shape == (2, 4 * 4 / 2**2, 3 * 2**2)
    for row, column in itertools.product(range(2), range(2)):
        patch = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(tokens[:, 2 * row + column], patch.reshape(2, 12))
    assert torch.equal(unpatchify(tokens, 2, 4), images)


# TARFlow, section 2.4: noise


def test_section_2_4_uniform_noise_fills_the_cell_of_each_grey_level():
    """y = (k + u) / 128 - 1"""
    k, u = torch.arange(256, dtype=torch.float64), torch.rand(256, dtype=torch.float64)
    close(dequantise((k / 127.5 - 1).view(1, 1, 16, 16), u.view(1, 1, 16, 16)).flatten(), (k + u) / 128 - 1)


def test_section_2_4_the_probability_of_an_8_bit_image_is_its_cells(make_flow):
    """P(x) = integral of p(x + u) over u in [0, bin]^D, here of one pixel under a normal density of width 1/4."""
    kind = {"image_size": 1, "patch_size": 1, "in_channels": 1, "num_classes": 0, "noise_conditioned": False}
    flow, k = make_flow(fresh=True, input_scale=4.0, learned_first_token=True, **kind), torch.tensor([40, 128, 200])
    found = likelihoods(
        flow, Posterior((k / 127.5 - 1).view(3, 1, 1, 1), None), None, [Noise("uniform", None)], draws=50
    )
    edges = torch.stack([k, k + 1]).double() / 128 - 1
    low, high = Normal(0.0, 0.25).cdf(edges)
    close(found.bits[:, 0], -torch.log2(high - low), atol=0.02, rtol=0)


# TARFlow, section 2.5: denoising by the score


def test_eq_7_tweedies_formula_gives_the_mean_of_clean_images(make_flow):
    """E[x | y] = y + sigma^2 grad_y log q(y), for Gaussian data of standard deviation s.

    Then q = N(0, s^2 + sigma^2), which a flow that only scales by 1 / sqrt(s^2 + sigma^2) has as its density.
    """
    s, sigma = 0.5, 0.3
    flow = make_flow(fresh=True, input_scale=1 / math.hypot(s, sigma)).double()
    y = randn(3, *flow.image_shape)
    close(FlowDenoiser(flow).score(y, None, sigma), -y / (s**2 + sigma**2))
    close(FlowDenoiser(flow)(y, None, sigma), y * s**2 / (s**2 + sigma**2), atol=1e-6, rtol=1e-6)


def test_eq_8_denoising_by_the_score_of_the_model(flow, make_inputs):
    """x = y + sigma^2 grad_y log p_model(y), the gradient by finite differences."""
    y, labels, sigma = make_inputs(flow.double())
    sigma = torch.full((3,), 0.3, dtype=torch.float64) if sigma is None else sigma
    step, dims = 1e-5, y[0].numel()
    steps = step * torch.eye(dims, dtype=y.dtype).view(dims, *flow.image_shape)
    gradient = torch.zeros_like(y)
    for n in range(3):
        rest = [None if value is None else value[n : n + 1].expand(dims) for value in (labels, sigma)]
        up, down = (flow.log_prob(y[n] + sign * steps, *rest).detach() for sign in (1, -1))
        gradient[n] = ((up - down) / (2 * step)).view(flow.image_shape)
    denoiser = FlowDenoiser(flow)
    close(denoiser.score(y, labels, sigma), gradient, atol=1e-6, rtol=1e-6)
    close(denoiser(y, labels, sigma), y + sigma.view(3, 1, 1, 1) ** 2 * gradient, atol=1e-6, rtol=1e-6)


# TARFlow, section 2.6: guidance, and appendix B


def passes(seed=0):
    """(mu, alpha) of a pass with labels and of one without, each (B, N, D)."""
    mu, alpha, mu_u, alpha_u = randn(4, 2, 5, 3, seed=seed)
    return (mu, 0.5 * alpha), (mu_u, 0.5 * alpha_u)


def test_eq_9_a_guided_block_is_inverted_with_guided_affine_maps(plain, make_inputs):
    """x_i = z_i exp(alpha~_i) + mu~_i"""
    guidance, noise_level = Guidance(weight=1.5, rule="log_scale", schedule="constant"), make_inputs(plain).noise_level
    for block, condition, tokens in blocks_of(plain, make_inputs):
        unconditional = condition_of(plain, block, None, noise_level)
        z = own_order(block, tokens)
        x = torch.zeros_like(z)
        for i in range(block.num_tokens):
            (mu, alpha), (mu_u, alpha_u) = (mu_alpha(block, x[:, :i], c) for c in (condition, unconditional))
            x[:, i] = z[:, i] * torch.exp(2.5 * alpha - 1.5 * alpha_u) + (2.5 * mu - 1.5 * mu_u)
        with torch.no_grad():
            close(block.inverse(tokens, condition, unconditional, guidance), own_order(block, x))


def test_eq_10_guidance_of_shift_and_log_scale():
    """mu~ = (1 + w) mu - w mu_u,  alpha~ = (1 + w) alpha - w alpha_u"""
    (mu, alpha), (mu_u, alpha_u) = passes()
    w = torch.linspace(0, 3, 5, dtype=torch.float64)[:, None]
    expected = (1 + w) * mu - w * mu_u, torch.exp((1 + w) * alpha - w * alpha_u)
    close(guide((mu, alpha), (mu_u, alpha_u), w, Guidance(weight=3, rule="log_scale")), expected)


def test_guidance_of_shift_and_scale_as_in_the_code_of_itarflow():
    """mu~ = (1 + w) mu - w mu_u,  sigma~ = (1 + w) sigma - w sigma_u"""
    (mu, alpha), (mu_u, alpha_u) = passes()
    w = torch.linspace(0, 3, 5, dtype=torch.float64)[:, None]
    expected = (1 + w) * mu - w * mu_u, (1 + w) * alpha.exp() - w * alpha_u.exp()
    close(guide((mu, alpha), (mu_u, alpha_u), w, Guidance(weight=3, rule="scale")), expected)


def test_guidance_by_a_product_of_gaussians_as_in_starflow():
    """N(mu, sigma^2)^(1 + w) / N(mu_u, sigma_u^2)^w, as if sigma_u were never below sigma."""
    (mu, alpha), (mu_u, alpha_u) = passes()
    w = torch.linspace(0, 3, 5, dtype=torch.float64)[:, None]
    variance, variance_u = (2 * alpha).exp(), torch.maximum((2 * alpha).exp(), (2 * alpha_u).exp())
    precision = (1 + w) / variance - w / variance_u
    mean = ((1 + w) * mu / variance - w * mu_u / variance_u) / precision
    expected = mean, 1 / precision.sqrt()
    close(guide((mu, alpha), (mu_u, alpha_u), w, Guidance(weight=3, rule="gaussian")), expected)


def test_appendix_b_the_weight_grows_with_the_position():
    """w_i = w i / (N - 1)"""
    w, count = 3.0, 5
    expected = torch.tensor([[w * i / (count - 1)] for i in range(count)])
    close(Guidance(weight=w, schedule="linear").weights(torch.arange(count), count, torch.float32), expected)


def test_appendix_b_a_temperature_divides_the_logits_of_attention(plain, make_inputs):
    """softmax(q k^T / (tau sqrt(E))): the same as dividing all queries by tau."""
    tau = 0.5
    _, labels, noise_level = make_inputs(plain)
    for block, _, tokens in blocks_of(plain, make_inputs):
        cooled = copy.deepcopy(block)
        with torch.no_grad():
            for layer in (module for module in cooled.modules() if isinstance(module, Attention)):
                query = slice(0, layer.qkv.in_features)  # queries come first, then keys, then values
                layer.qkv.weight[query] /= tau
                layer.qkv.bias[query] /= tau
        tempered = condition_of(plain, block, labels, noise_level, temperature=tau)
        untouched = condition_of(plain, cooled, labels, noise_level)
        close(block.affine_at(tokens[:, :-1], tempered), cooled.affine_at(tokens[:, :-1], untouched))


def test_eq_11_a_model_without_labels_is_guided_by_its_own_attention_at_another_temperature(make_flow, make_inputs):
    """mu~_i = (1 + w) mu_i(x_{<i}; 1) - w mu_i(x_{<i}; tau),  alpha~_i likewise"""
    w, tau = 2.0, 1.5
    flow = make_flow(num_classes=0, num_layers=(2,)).double()
    ((block, condition, z),) = blocks_of(flow, make_inputs)
    tempered = condition_of(flow, block, None, make_inputs(flow).noise_level, temperature=tau)
    x = torch.zeros_like(z)
    for i in range(block.num_tokens):
        (mu, alpha), (mu_tau, alpha_tau) = (mu_alpha(block, x[:, :i], c) for c in (condition, tempered))
        w_i = w * i / (block.num_tokens - 1)
        x[:, i] = z[:, i] * torch.exp((1 + w_i) * alpha - w_i * alpha_tau) + (1 + w_i) * mu - w_i * mu_tau
    guidance = Guidance(weight=w, rule="log_scale", temperature=tau)
    images = flow.inverse(z, None, make_inputs(flow).noise_level, guidance=guidance)
    close(patchify(images, 2), x)
    assert not torch.allclose(images, flow.inverse(z, None, make_inputs(flow).noise_level), atol=1e-3)


# iTARFlow, section 3.1: training at all noise levels


@pytest.mark.parametrize(
    ("weight", "gamma"),
    [
        ("one", lambda t: 1.0),
        ("t", lambda t: t),
        ("t2", lambda t: t**2),
        ("t_normalised", lambda t: t / (0.1 + 0.7)),
        ("t2_normalised", lambda t: t**2 / (0.1**2 + 0.7**2)),
    ],
)
def test_section_3_1_the_objective(make_flow, weight, gamma):
    """E_{x, t, eps} gamma_t [-log p(x + t eps, t)] / (N D), up to a constant"""
    flow = make_flow().double()
    recipe = Recipe(
        name="tiny",
        model=ModelConfig(image_size=4, in_channels=2, num_classes=3),
        data=DataConfig(path="digits"),
        noise=NoiseConfig(t_min=0.1, t_max=0.7, weight=weight),
    )
    levels, eps = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64), randn(3, *flow.image_shape)
    grey = torch.randint(256, eps.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels, never = torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.bool)
    expected = 0.0
    for n, t in enumerate(levels.tolist()):
        x = grey[n] / 127.5 - 1
        log_prob = flow.log_prob((x + t * eps[n])[None], labels[n : n + 1], t)
        expected += gamma(t) * (-log_prob / x.numel() - 0.5 * math.log(2 * math.pi)) / 3
    losses = training_losses(flow, recipe, grey, labels, Draws(levels, eps, never, never, None))
    close(losses.loss, expected[0], atol=1e-6, rtol=1e-6)  # pixels are float32
    close(loss_weight(recipe.noise, levels), torch.tensor([gamma(t) for t in levels.tolist()], dtype=torch.float64))


def test_section_3_1_distributions_of_the_noise_level():
    """t = t_min + u (t_max - t_min); or t^2 is uniform; or, after EDM, log t is normal around -1.2."""
    u = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    close(uniform_level(u, 0.2, 0.6), 0.2 + u * (0.6 - 0.2))
    close(quadratic_level(u, 0.2, 0.6) ** 2, 0.2**2 + u * (0.6**2 - 0.2**2))
    close(lognormal_level(u).log(), u - 1.2)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = draw_noise_level(NoiseConfig(t_min=0.2, t_max=0.6), 100, seeds[0])
    assert torch.equal(drawn, uniform_level(torch.rand(100, generator=seeds[1]), 0.2, 0.6))


# iTARFlow, section 3.2: sampling at t_max, then denoising along the ODE


def test_eq_5_tweedies_formula_at_every_noise_level(plain, make_inputs):
    """x_0 = x_t + t^2 grad_x log p(x_t, t), each image at a level of its own, the gradient by autograd."""
    x_t, labels, t = make_inputs(plain)
    x = x_t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(plain.log_prob(x, labels, t).sum(), x)
    close(FlowDenoiser(plain)(x_t, labels, t), x_t + t.view(3, 1, 1, 1) ** 2 * gradient)


def test_section_3_2_sampling_is_the_inverse_at_t_max_and_then_the_ode(plain):
    """dx = -t grad_x log p(x, t) dt, by Euler from t_max to t_min and from there to 0."""
    t_max, t_min, num_steps = 0.5, 0.1, 4
    labels, denoiser = torch.tensor([0, 2]), FlowDenoiser(plain)
    noisy = plain.inverse(randn(2, *plain.z_shape), labels, t_max)
    x = noisy
    for t, t_next in itertools.pairwise([*torch.linspace(t_max, t_min, num_steps).tolist(), 0.0]):
        x = x - t * denoiser.score(x, labels, t) * (t_next - t)
    schedule = DenoiseScheduler(t_max=t_max, t_min=t_min, num_denoise_steps=num_steps)
    close(denoise(denoiser, noisy, labels, schedule), x, atol=1e-6, rtol=1e-6)


def test_section_3_2_noise_levels():
    """t_k = t_max + k / (n - 1) (t_min - t_max),  k = 0 .. n - 1, then 0; quadratic: the same of square roots."""
    t_max, t_min, n = 0.5, 0.01, 6
    even = [t_max + k / (n - 1) * (t_min - t_max) for k in range(n)]
    roots = [math.sqrt(t_max) + k / (n - 1) * (math.sqrt(t_min) - math.sqrt(t_max)) for k in range(n)]
    assert noise_levels(t_max, t_min, n, "even") == pytest.approx([*even, 0])
    assert noise_levels(t_max, t_min, n, "quadratic") == pytest.approx([*(root**2 for root in roots), 0])


# The solvers of that ODE. Its slope is d(x, t) = (x - x0(x, t)) / t; x0 is any function here.


def x0(x, t):
    return torch.tanh((1 - t) * x) + t


def d(x, t):
    return (x - x0(x, t)) / t


def solve(method, x, levels, generator=None):
    """What the library makes of x along even levels, the last of which is 0."""
    num_steps = len(levels) - 1 if method != "heun" else 2 * len(levels) - 3
    schedule = DenoiseScheduler(t_max=levels[0], t_min=levels[-2], num_denoise_steps=num_steps, method=method)
    return denoise(
        lambda noisy, labels, noise_level: x0(noisy, noise_level[0]), x, None, schedule, generator=generator
    )


LEVELS = [0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
PAIRS = list(itertools.pairwise(LEVELS[:-1]))  # the last step, to 0, gives x0(x, 0.1) in each method


def test_euler():
    """x' = x0 + (t'/t) (x - x0) = x + h d(x, t),  h = t' - t"""
    x = start = randn(2, 1, 3, 3)
    for t, t_next in PAIRS:
        x = x + (t_next - t) * d(x, t)
    close(solve("euler", start, LEVELS), x0(x, 0.1))


def test_heun():
    """x' = x + h/2 (d(x, t) + d(x + h d(x, t), t'))"""
    x = start = randn(2, 1, 3, 3)
    for t, t_next in PAIRS:
        h = t_next - t
        x = x + h / 2 * (d(x, t) + d(x + h * d(x, t), t_next))
    close(solve("heun", start, LEVELS), x0(x, 0.1))


def test_multistep():
    """x' = x + h (d_n + r/2 (d_n - d_{n-1})),  r = h / (t_n - t_{n-1}), after a step of Euler's"""
    x = start = randn(2, 1, 3, 3)
    t_before, d_before = None, None
    for t, t_next in PAIRS:
        h, d_n = t_next - t, d(x, t)
        r = 0 if t_before is None else h / (t - t_before)
        x = x + h * (d_n + r / 2 * (d_n - (d_n if d_before is None else d_before)))
        t_before, d_before = t, d_n
    close(solve("multistep", start, LEVELS), x0(x, 0.1))


def test_predictor_corrector():
    """x' = a x + (1 - a) (x0 - t c) - t' c log a,  a = t'/t: exact if the clean estimate at s is x0 + c (s - t).

    c is first that of the line through the two estimates before, then of the line to the estimate ahead.
    """

    def step(x, estimate, c, t, t_next):
        a = t_next / t
        return a * x + (1 - a) * (estimate - t * c) - t_next * c * math.log(a)

    x = start = randn(2, 1, 3, 3)
    estimate, c = x0(x, LEVELS[0]), 0.0
    for t, t_next in PAIRS:
        ahead = x0(step(x, estimate, c, t, t_next), t_next)  # at the predicted point: the only evaluation of the step
        c = (ahead - estimate) / (t_next - t)
        x = step(x, estimate, c, t, t_next)
        estimate = ahead
    close(solve("predictor-corrector", start, LEVELS), estimate)


def test_sde():
    """x' = x0 + t' (a (x - x0)/t + sqrt(1 - a^2) e),  a = t'/t,  e ~ N(0, I)"""
    x = start = randn(2, 1, 3, 3)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    for t, t_next in PAIRS:
        a, e = t_next / t, torch.randn(x.shape, generator=generators[0], dtype=torch.float32)
        x = x0(x, t) + t_next * (a * d(x, t) + math.sqrt(1 - a**2) * e)
    close(solve("sde", start, LEVELS, generators[1]), x0(x, 0.1))


@pytest.mark.parametrize(
    ("method", "order", "t_min"),
    # The predictor-corrector's error at 0.01 is so small that its order shows only later.
    [("euler", 1, 0.01), ("heun", 2, 0.01), ("multistep", 2, 0.01), ("predictor-corrector", 2, 0.3)],
)
@pytest.mark.parametrize("spacing", ["even", "quadratic"])
@pytest.mark.parametrize("odd", [0, 1])
def test_solvers_approach_the_closed_form_for_gaussian_data_in_their_order(method, order, t_min, spacing, odd):
    """x(t) = x(T) sqrt((s^2 + t^2) / (s^2 + T^2)) for data of standard deviation s; then Tweedie's step to 0."""
    s, t_max = 0.5, 1.0

    def clean(noisy, labels, noise_level):
        return noisy * s**2 / (s**2 + noise_level.view(-1, 1, 1, 1) ** 2)

    noisy = math.hypot(s, t_max) * randn(3, 1, 2, 2)
    at_t_min = noisy * math.sqrt((s**2 + t_min**2) / (s**2 + t_max**2))
    exact = clean(at_t_min, None, torch.tensor([t_min]))

    def error(n):
        schedule = DenoiseScheduler(t_max=t_max, t_min=t_min, num_denoise_steps=n, method=method, spacing=spacing)
        return (denoise(clean, noisy, None, schedule) - exact).abs().max().item()

    assert math.log2(error(80 + odd) / error(160 + odd)) == pytest.approx(order, abs=0.15)


# iTARFlow, section 4: the architecture


def test_section_4_the_noise_level_is_embedded_by_fourier_features_of_its_logarithm(randomise):
    """e(t) = W_2 GELU(W_1 [sin(w_k log t), ..., cos(w_k log t), ...] + b_1) + b_2,  w_k = 10000^(-k/h)"""
    h = 3
    embedding = NoiseLevelEmbedding(2 * h).double()
    randomise(embedding)
    (w_1, b_1), (w_2, b_2) = ((layer.weight, layer.bias) for layer in (embedding.mlp[0], embedding.mlp[2]))
    for t in (0.01, 0.3):
        angles = [10000 ** (-k / h) * math.log(t) for k in range(h)]
        features = torch.tensor([f(angle) for f in (math.sin, math.cos) for angle in angles], dtype=torch.float64)
        hidden = w_1 @ features + b_1
        hidden = hidden * Normal(0.0, 1.0).cdf(hidden)
        close(embedding(torch.tensor([t], dtype=torch.float64))[0], w_2 @ hidden + b_2, atol=1e-6, rtol=0)


# iTARFlow, table 7: a diffusion model denoises


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_table_7_a_diffusion_model_knows_the_clean_image(prediction):
    """y = a x_t,  a = 1 / sqrt(1 + t^2);  x_0 = x_t - t eps, or a (y - t v), or what the model predicts."""
    t, clean, eps = 0.3, randn(1, 1, 2, 2, seed=1), randn(1, 1, 2, 2, seed=2)
    a, s = 1 / math.sqrt(1 + t**2), t / math.sqrt(1 + t**2)
    told = {"epsilon": eps, "v_prediction": a * eps - s * clean, "sample": clean}[prediction]

    class Model(torch.nn.Module):
        def forward(self, y, k):
            close(y, a * clean + s * eps)
            return SimpleNamespace(sample=told)

    denoiser = DiffusionDenoiser(Model(), DDPMScheduler(prediction_type=prediction))
    close(denoiser(clean + t * eps, None, t), clean)
