"""The batched colour operations against torchvision's functional ones, one sample at a time."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as oracle

from ssl_pipeline.augment import on_accelerator, on_cpu
from ssl_pipeline.augment.draw import draw_operations, num_uniforms
from ssl_pipeline.augment.on_accelerator import augment_on_accelerator
from ssl_pipeline.augment.operations.blur import blur, blur_by_matrices
from ssl_pipeline.augment.operations.jitter import Adjustment
from ssl_pipeline.augment.photometric import apply_photometric, stages_per_view
from ssl_pipeline.augment.views import ViewGroup
from tests.augment.columns import NUM_COLUMNS, Column

ADJUST = (oracle.adjust_brightness, oracle.adjust_contrast, oracle.adjust_saturation, oracle.adjust_hue)
NEVER = {"jitter_prob": 0.0, "gray_prob": 0.0}
UNNORMALISED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def augment_on_cpu(crops_NCHW, draws_NP, stages):
    out_NCHW = torch.full(crops_NCHW.shape, torch.nan, device=crops_NCHW.device)
    on_cpu.augment_on_cpu(crops_NCHW, draws_NP, stages, out=out_NCHW)
    return out_NCHW


def stages_of(group):
    return stages_per_view(group, size=group.size, **UNNORMALISED)


def draw(group, num_images, seed=0):
    """What is drawn for each view of some images: (V,B,P)."""
    uniforms = np.random.default_rng(seed).random((group.count, num_images, num_uniforms(group)))
    return torch.from_numpy(draw_operations(uniforms, group, size=group.size))


@pytest.fixture(params=[augment_on_cpu, augment_on_accelerator])
def augment(request):
    """Both ways to compute: on the samples concerned (CPU), and on all of them (accelerators)."""

    def run(crops_NCHW, draws_NP, group):
        return request.param(crops_NCHW, draws_NP, stages_of(group)[0])

    return run


def one_at_a_time(crops_NCHW, draws_NP, group):
    """Torchvision's result, and how far each value was from the threshold when it came to solarization."""
    results, margins = [], []
    for crop, row in zip(crops_NCHW, draws_NP.tolist(), strict=True):
        image = crop.float() / 255
        if row[Column.JITTER]:
            for operation in np.argsort(row[Column.TURN : Column.TURN + 4]):
                image = ADJUST[operation](image, row[Column.FACTOR + operation])
        if row[Column.GRAY]:
            image = oracle.rgb_to_grayscale(image, num_output_channels=3)
        if row[Column.BLUR_SIGMA]:
            image = oracle.gaussian_blur(image, [group.blur_kernel_size(group.size)] * 2, [row[Column.BLUR_SIGMA]] * 2)
        margins.append((image - group.solarize_threshold).abs())
        if row[Column.SOLARIZE]:
            image = oracle.solarize(image, group.solarize_threshold)
        results.append(image)
    return torch.stack(results), torch.stack(margins)


def assert_equals_torchvision(result_NCHW, crops_NCHW, draws_NP, group):
    expected_NCHW, margin_NCHW = one_at_a_time(crops_NCHW, draws_NP, group)
    # where rounding decides on which side of the threshold a value falls, either result is right
    decided = (margin_NCHW > 1e-5) | (draws_NP[:, Column.SOLARIZE] == 0)[:, None, None, None]
    assert decided.float().mean() > 0.98
    assert_close(result_NCHW * decided, expected_NCHW * decided, atol=1e-5, rtol=0)


def neutral(samples):
    """The draws of views that nothing happens to."""
    draws_NP = torch.zeros(samples, NUM_COLUMNS)
    draws_NP[:, Column.TURN : Column.TURN + 4] = torch.arange(4.0)
    draws_NP[:, Column.FACTOR : Column.FACTOR + 3] = 1.0
    return draws_NP


def noise(samples, size=12, seed=0):
    return torch.randint(0, 256, (samples, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def flat_colours(size=6):
    """Black, white, grays and the corners of the colour cube, one flat image each."""
    levels = [(v, v, v) for v in (0, 1, 127, 128, 254, 255)] + list(itertools.product((0, 255), repeat=3))
    levels += [(10, 200, 200), (200, 10, 200), (200, 200, 10), (128, 128, 129)]
    return torch.tensor(levels, dtype=torch.uint8)[:, :, None, None].expand(-1, 3, size, size).contiguous()


def test_all_24_orders_equal_torchvision(augment):
    group = ViewGroup(size=12)
    crops, draws = noise(24), neutral(24)
    generator = torch.Generator().manual_seed(1)
    draws[:, Column.JITTER] = 1
    draws[:, Column.TURN : Column.TURN + 4] = torch.tensor(list(itertools.permutations(range(4))))
    draws[:, Column.FACTOR : Column.FACTOR + 3] = torch.rand(24, 3, generator=generator) * 2
    draws[:, Column.FACTOR + Adjustment.HUE] = torch.rand(24, generator=generator) - 0.5
    assert_equals_torchvision(augment(crops, draws, group), crops, draws, group)


@pytest.mark.parametrize("operation", Adjustment, ids=lambda operation: operation.name)
def test_each_operation_alone_equals_torchvision_up_to_the_extreme_factors(augment, operation):
    group = ViewGroup(size=6)
    factors = (-0.5, -1 / 3, -0.1, 0.0, 1 / 6, 0.5) if operation == Adjustment.HUE else (0.0, 0.3, 1.0, 1.7, 2.0)
    images = torch.cat([flat_colours(), noise(4, size=6)])
    crops = images.repeat(len(factors), 1, 1, 1)
    draws = neutral(len(crops))
    draws[:, Column.JITTER] = 1
    draws[:, Column.FACTOR + operation] = torch.tensor(factors).repeat_interleave(len(images))
    assert_equals_torchvision(augment(crops, draws, group), crops, draws, group)


def test_all_extreme_factors_together_equal_torchvision(augment):
    group = ViewGroup(size=6)
    extremes = torch.tensor(list(itertools.product((0.0, 2.0), (0.0, 2.0), (0.0, 2.0), (-0.5, 0.5))))
    images = torch.cat([flat_colours(), noise(2, size=6)])
    crops = images.repeat(len(extremes), 1, 1, 1)
    draws = neutral(len(crops))
    draws[:, Column.JITTER] = 1
    draws[:, Column.FACTOR : Column.FACTOR + 4] = extremes.repeat_interleave(len(images), dim=0)
    assert_equals_torchvision(augment(crops, draws, group), crops, draws, group)


def test_grayscale_and_solarization_alone_equal_torchvision(augment):
    group = ViewGroup(size=6, solarize_prob=0.5)
    crops = torch.cat([flat_colours(), noise(6, size=6)])
    for column in (Column.GRAY, Column.SOLARIZE):
        draws = neutral(len(crops))
        draws[::2, column] = 1
        result = augment(crops, draws, group)
        expected, _ = one_at_a_time(crops, draws, group)
        assert_close(result, expected, atol=1e-6, rtol=0)


def test_solarization_starts_at_the_threshold_itself(augment):
    group = ViewGroup(size=1, solarize_prob=1.0)
    crops = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    draws = neutral(4)
    draws[:, Column.SOLARIZE] = 1
    solarized = (augment(crops, draws, group) * 255).round()[:, 0, 0, 0]
    assert solarized.tolist() == [0, 127, 127, 0]


@pytest.mark.parametrize(("size", "kernel"), [(32, None), (32, 3), (9, None), (5, None), (4, 7), (2, None), (1, None)])
def test_blur_equals_torchvision_for_each_samples_own_sigma(augment, size, kernel):
    group = ViewGroup(size=size, blur_prob=0.5, blur_kernel=kernel, **NEVER)
    crops, draws = noise(6, size=size), neutral(6)
    draws[:, Column.BLUR_SIGMA] = torch.tensor([0.1, 0.0, 0.5, 1.0, 2.0, 0.0])
    result = augment(crops, draws, group)
    assert_equals_torchvision(result, crops, draws, group)
    assert torch.equal(result[[1, 5]], crops[[1, 5]].float() / 255)


def test_blur_keeps_a_flat_image(augment):
    group = ViewGroup(size=20, blur_prob=1.0)
    crops, draws = torch.full((1, 3, 20, 20), 77, dtype=torch.uint8), neutral(1)
    draws[:, Column.BLUR_SIGMA] = 2.0
    assert_close(augment(crops, draws, group), crops / 255, atol=1e-6, rtol=0)


def test_everything_together_equals_torchvision(augment):
    group = ViewGroup(size=16, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5, blur_prob=0.5, solarize_prob=0.4)
    crops, draws = noise(64, size=16), draw(group, 64)[0]
    assert_equals_torchvision(augment(crops, draws, group), crops, draws, group)


def test_strengths_of_zero_are_skipped_like_torchvision_skips_them(augment):
    group = ViewGroup(size=8, jitter_prob=1.0, contrast=0.0, hue=0.0, gray_prob=0.0)
    assert stages_of(group)[0].operations[0].setting == (Adjustment.BRIGHTNESS, Adjustment.SATURATION)
    crops, draws = noise(16, size=8), draw(group, 16)[0]
    assert_equals_torchvision(augment(crops, draws, group), crops, draws, group)


def test_views_that_nothing_happens_to_stay_exact(augment):
    group = ViewGroup(size=12, blur_prob=1.0, solarize_prob=1.0)
    crops = noise(3)
    assert torch.equal(augment(crops, neutral(3), group), crops.float() / 255)


def test_each_view_follows_its_own_settings_and_is_normalised():
    group = ViewGroup(
        count=3, size=8, jitter_prob=(0, 1, 0), gray_prob=0.0, solarize_prob=(0, 0, 1), solarize_threshold=0.0
    )
    crops = noise(12, size=8).view(3, 4, 3, 8, 8)
    draws = draw(group, 4)
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    views = apply_photometric(crops, draws, group, mean=mean, std=std)
    assert views.dtype == torch.float32
    assert views.shape == crops.shape
    jittered, _ = one_at_a_time(crops[1], draws[1], group)
    plain = torch.stack([crops[0] / 255, jittered, 1 - crops[2] / 255])
    expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert_close(views, expected, atol=1e-4, rtol=0)
    assert (jittered - crops[1] / 255).abs().max() > 0.05


def test_a_view_does_not_depend_on_its_batch():
    group = ViewGroup(size=16, blur_prob=0.5, solarize_prob=0.2)
    crops, draws = noise(20, size=16)[None], draw(group, 20)
    normalise = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    together = apply_photometric(crops, draws, group, **normalise)
    for sample in range(20):
        rows = slice(sample, sample + 1)
        alone = apply_photometric(crops[:, rows], draws[:, rows], group, **normalise)
        assert_close(together[:, rows], alone, atol=1e-5, rtol=0)


def test_autocast_does_not_reach_the_blur():
    group = ViewGroup(size=16, blur_prob=1.0, **NEVER)
    crops, draws = noise(4, size=16)[None], draw(group, 4)
    plain = apply_photometric(crops, draws, group, **UNNORMALISED)
    with torch.autocast("cpu", torch.bfloat16):
        cast = apply_photometric(crops, draws, group, **UNNORMALISED)
    assert torch.equal(plain, cast)


def test_accelerators_never_wait_for_a_value():
    # the meta device holds no values: reading one, or a shape that depends on one, is an error there
    group = ViewGroup(size=8, blur_prob=0.5, solarize_prob=0.5)
    image, draws = torch.empty(5, 3, 8, 8, device="meta"), torch.empty(5, NUM_COLUMNS, device="meta")
    stages = stages_of(group)[0]
    augment_on_accelerator(image, draws, stages)
    with pytest.raises((RuntimeError, NotImplementedError)):  # the check bites
        augment_on_cpu(image, draws, stages)


@pytest.mark.slow
def test_the_accelerator_path_compiles_to_one_graph():
    group = ViewGroup(size=8, blur_prob=0.5, blur_kernel=3, solarize_prob=0.5)
    crops, draws = noise(8, size=8), draw(group, 8)[0]
    compiled = torch.compile(augment_on_accelerator, backend="eager", fullgraph=True)
    image = compiled(crops, draws, stages_of(group)[0])
    assert_equals_torchvision(image, crops, draws, group)


@pytest.mark.other
def test_a_second_batch_compiles_nothing_new():
    group = ViewGroup(count=3, size=8, jitter_prob=0.0, blur_prob=(0.5, 0.5, 0.0), blur_kernel=3)
    counter = CompileCounter()
    augment = torch.compile(augment_on_accelerator, backend=counter, fullgraph=True, dynamic=False)
    for seed in range(3):
        draws = draw(group, 4, seed)
        for view, stages in enumerate(stages_of(group)):
            augment(noise(4, size=8, seed=seed), draws[view], stages)
    assert counter.frame_count == 2  # one for each kind of view


@pytest.mark.other
def test_views_of_many_sizes_are_compiled_once_each(monkeypatch, recwarn):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    fused = on_accelerator.Fused()
    for size in [*range(8, 18), *range(8, 18)]:  # torch gives up at the ninth on its own
        fused(noise(2, size=size), neutral(2), stages_of(ViewGroup(size=size, jitter_prob=0.0))[0])
    assert counter.frame_count == 10
    assert not recwarn.list


def test_where_torch_cannot_compile_the_colours_run_as_they_are_and_say_so_once(monkeypatch, recwarn):
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    stages = stages_of(ViewGroup(size=8))[0]
    crops, draws = noise(8, size=8), draw(ViewGroup(size=8), 8)[0]
    fused = on_accelerator.Fused()
    for _ in range(2):
        assert torch.equal(fused(crops, draws, stages), augment_on_accelerator(crops, draws, stages))
    assert [str(warning.message) for warning in recwarn] == [
        "The colours of a batch run one operation at a time on this GPU, which is slower: torch.compile failed "
        "(RuntimeError: Failed to find C compiler). It needs triton and a C compiler such as gcc."
    ]


def test_errors_of_the_colours_themselves_are_not_put_down_to_the_compiler(monkeypatch, recwarn):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *arguments: function(*arguments))
    stages = stages_of(ViewGroup(size=8))[0]
    with pytest.raises(IndexError):
        on_accelerator.Fused()(noise(8, size=8), torch.zeros(8, 0), stages)
    assert not recwarn.list


def test_float_crops_give_what_their_8_bit_levels_give(augment):
    group = ViewGroup(size=16, blur_prob=0.5, solarize_prob=0.2)
    crops, draws = noise(20, size=16), draw(group, 20)[0]
    floats = crops.float()
    assert torch.equal(augment(floats, draws, group), augment(crops, draws, group))
    assert torch.equal(floats, crops.float())


@pytest.mark.parametrize("budget", [1, 3 * 16 * 16 * 7, 10**9])
def test_the_size_of_a_piece_changes_nothing(budget, monkeypatch):
    group = ViewGroup(count=2, size=16, blur_prob=0.5, solarize_prob=(0.0, 0.3))
    crops, draws = noise(40, size=16).view(2, 20, 3, 16, 16), draw(group, 20)
    monkeypatch.setattr(on_cpu, "PIECE_VALUES", budget)
    views = apply_photometric(crops, draws, group, **UNNORMALISED)
    for view in range(2):
        assert_equals_torchvision(views[view], crops[view], draws[view], group)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.3, 2.0])
def test_a_cpus_narrower_kernel_blurs_as_the_full_one(sigma):
    image, sigmas = noise(2, size=40).float() / 255, torch.tensor([sigma, sigma / 2])
    full = blur(image, sigmas, 23)
    assert_close(blur_by_matrices(image, sigmas, 23, out=torch.empty_like(image)), full, atol=3e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_gives_what_the_cpu_gives_and_never_waits(compile):
    group = ViewGroup(count=2, size=32, blur_prob=(1.0, 0.1), solarize_prob=(0.0, 0.2))
    crops, draws = noise(128, size=32).view(2, 64, 3, 32, 32), draw(group, 64)
    settings = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "compile": compile}
    expected = apply_photometric(crops, draws, group, **settings)
    crops, draws = crops.cuda(), draws.cuda()
    apply_photometric(crops, draws, group, **settings)  # which compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = apply_photometric(crops, draws, group, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    off = (views.cpu() - expected).abs() > 1e-4
    assert off.float().mean() < 1e-3  # values at the threshold of solarization
