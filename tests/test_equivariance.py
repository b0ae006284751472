"""Scaling and rotation of latents against those of images."""

from collections import Counter

import pytest
import torch

from diffusers_vae.losses.equivariance import DRAWS, Transformation, draw, smallest


def drawn(count, probability=0.5, size=(8, 8)):
    generator = torch.Generator().manual_seed(0)
    return [draw(torch.rand(DRAWS, generator=generator), probability, size, 4) for _ in range(count)]


def test_images_and_latents_of_a_transformation_agree():
    """Latents that are the images' own pixels, 4 x 4 of one value each, stay so."""
    for size in ((8, 8), (3, 8)):
        latents = torch.arange(64.0).view(1, 1, 8, 8)
        images = latents.repeat_interleave(4, -1).repeat_interleave(4, -2)
        for turns in range(4):
            transformation = Transformation((8, 8), turns, 4)
            expected = transformation.latents(latents).repeat_interleave(4, -1).repeat_interleave(4, -2)
            assert torch.equal(transformation.images(images), expected)
        shape = Transformation(size, 1, 4).images(images).shape
        assert shape[-2:] == (4 * size[1], 4 * size[0])


def test_resizes_and_rotates_as_torch_does():
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False)
    found = Transformation((4, 4), 3, 4).images(images)
    torch.testing.assert_close(found, torch.rot90(expected, 3, (-2, -1)))


def test_shares_of_steps_that_transform_images_or_latents():
    found = Counter((bool(images), bool(latents)) for images, latents in drawn(4000))
    assert found[False, True] / 4000 == pytest.approx(0.5, abs=0.03)
    assert found[True, False] / 4000 == pytest.approx(0.5 * 0.25, abs=0.02)
    assert found[True, True] == 0
    assert Counter(bool(latents) for _, latents in drawn(100, probability=1.0)) == {True: 100}


def test_every_size_and_angle_is_drawn():
    latents = [transformation for _, transformation in drawn(2000) if transformation]
    assert {t.quarter_turns for t in latents} == {1, 2, 3}
    assert {t.size for t in latents} == {(side, side) for side in range(2, 8)}
    assert smallest((8, 8)) == (2, 2)
    wide = [t for _, t in drawn(500, size=(8, 12)) if t]
    assert {t.size for t in wide} == {(2, 3), (3, 4), (4, 6), (5, 8), (6, 9), (7, 10)}


def test_latents_of_one_position_are_left_alone():
    assert drawn(100, size=(1, 1)) == [(None, None)] * 100
