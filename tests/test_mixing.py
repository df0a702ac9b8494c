"""Mixed and interleaved batches against loops over rows and pixels."""

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.mixing import cutmix, cutmix_boxes, deinterleave_rows, interleave_parts, interleave_rows, mixup


def images_and_targets(num_images=4, height=5, width=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 3, height, width, generator=generator)
    return images, torch.rand(num_images, 2, generator=generator), torch.tensor([2, 0, 3, 1])[:num_images]


def test_mixup_equals_the_loop_and_each_row_stays_nearer_to_its_own():
    images, targets, partners = images_and_targets()
    draws = torch.tensor([0.2, 0.9, 0.5, 1.0])
    mixed_images, mixed_targets = mixup(images, targets, draws=draws, partners=partners)
    for i, share in enumerate([0.8, 0.9, 0.5, 1.0]):
        other = partners[i]
        assert_close(mixed_images[i], share * images[i] + (1 - share) * images[other])
        assert_close(mixed_targets[i], share * targets[i] + (1 - share) * targets[other])


def test_one_draw_may_serve_the_whole_batch():
    images, targets, partners = images_and_targets()
    one = mixup(images, targets, draws=torch.tensor(0.3), partners=partners)
    each = mixup(images, targets, draws=torch.full((4,), 0.3), partners=partners)
    assert_close(one, each, rtol=0, atol=0)


def test_mixup_keeps_the_dtype_of_its_images():
    images, targets, partners = images_and_targets()
    mixed = mixup(images.bfloat16(), targets, draws=torch.tensor(0.3, dtype=torch.float64), partners=partners)
    assert [tensor.dtype for tensor in mixed] == [torch.bfloat16, torch.float32]


def test_a_box_covers_its_share_around_its_centre():
    boxes = cutmix_boxes(torch.tensor([0.75]), torch.tensor([[0.5, 0.25]]), height=8, width=16)
    assert boxes.tolist() == [[2, 0, 6, 8]]  # half of each side, about row 4 and column 4
    assert boxes.dtype == torch.int64


def test_what_lies_outside_of_the_image_is_cut_off():
    boxes = cutmix_boxes(
        torch.tensor([0.0, 0.75, 1.0]), torch.tensor([[0.5, 0.5], [0.0, 0.99], [0.3, 0.3]]), height=8, width=8
    )
    assert boxes.tolist() == [[0, 0, 8, 8], [0, 5, 2, 8], [2, 2, 2, 2]]


@pytest.mark.parametrize("boxes", [[[0, 0, 5, 6], [1, 2, 3, 6], [4, 4, 4, 4], [0, 5, 2, 6]], [1, 0, 4, 3]])
def test_cutmix_equals_the_loop_over_pixels(boxes):
    images, targets, partners = images_and_targets()
    mixed_images, mixed_targets = cutmix(images, targets, boxes=torch.tensor(boxes), partners=partners)
    for i in range(4):
        top, left, bottom, right = boxes[i] if isinstance(boxes[0], list) else boxes
        expected, inside = images[i].clone(), 0
        for y in range(5):
            for x in range(6):
                if top <= y < bottom and left <= x < right:
                    expected[:, y, x] = images[partners[i], :, y, x]
                    inside += 1
        assert torch.equal(mixed_images[i], expected)
        share = 1 - inside / 30
        assert_close(mixed_targets[i], share * targets[i] + (1 - share) * targets[partners[i]])


def interleave_by_loop(parts):
    """Row by row: where each row of the result comes from."""
    num_parts, num_rows = len(parts), len(parts[0])
    sizes = [num_rows // num_parts] * num_parts
    for extra in range(num_rows - sum(sizes)):
        sizes[-extra - 1] += 1
    group_of = [group for group, size in enumerate(sizes) for _ in range(size)]
    result = [[None] * num_rows for _ in parts]
    for part in range(num_parts):
        for row, group in enumerate(group_of):
            source = group if part == 0 else (0 if group == part else part)
            result[part][row] = parts[source][row]
    return [torch.stack(rows) for rows in result]


@pytest.mark.parametrize(("num_parts", "num_rows"), [(1, 3), (2, 4), (3, 3), (3, 8), (4, 7), (3, 2)])
def test_interleaved_parts_equal_the_loop_and_are_their_own_inverse(num_parts, num_rows):
    parts = list(torch.arange(2 * num_parts * num_rows).reshape(num_parts, num_rows, 2))
    interleaved = interleave_parts(parts)
    assert_close(interleaved, interleave_by_loop(parts))
    assert_close(interleave_parts(interleaved), parts)


def test_the_rows_that_are_left_over_are_in_the_last_groups():
    parts = [torch.tensor([10 * part + row for row in range(5)]) for part in range(3)]
    first, second, third = interleave_parts(parts)
    assert first.tolist() == [0, 11, 12, 23, 24]  # groups of 1, 2 and 2 rows
    assert second.tolist() == [10, 1, 2, 13, 14]
    assert third.tolist() == [20, 21, 22, 3, 4]


def test_interleaved_rows_are_the_transposed_table_and_come_back():
    rows = torch.arange(12).reshape(6, 2)
    interleaved = interleave_rows(rows, size=3)
    assert interleaved[:, 0].tolist() == [0, 6, 2, 8, 4, 10]  # rows 0 3 1 4 2 5
    assert torch.equal(deinterleave_rows(interleaved, size=3), rows)
    assert not torch.equal(interleave_rows(interleaved, size=3), rows)


ROWS = (torch.zeros(4, 3, 2, 2), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: mixup(*ROWS, draws=torch.zeros(3), partners=torch.arange(4)), r"shape \(\) or \(4,\). Got \(3,\)"),
        (lambda: mixup(*ROWS, draws=torch.zeros(4), partners=torch.arange(3)), r"Got .*\(4, 2\) and \(3,\)"),
        (lambda: cutmix(*ROWS, boxes=torch.zeros(3, 4), partners=torch.arange(4)), r"Got .* and \(3, 4\)"),
        (lambda: cutmix_boxes(torch.zeros(2), torch.zeros(2), height=2, width=2), r"Got \(2,\) and \(2,\)"),
        (lambda: interleave_parts([torch.zeros(3), torch.zeros(4)]), r"Got \[3, 4\]"),
        (lambda: interleave_parts([]), r"Got \[\]"),
        (lambda: interleave_rows(torch.zeros(4), size=3), "multiple of size=3 rows. Got 4"),
        (lambda: deinterleave_rows(torch.zeros(4), size=0), "multiple of size=0 rows. Got 4"),
    ],
)
def test_what_does_not_fit_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
