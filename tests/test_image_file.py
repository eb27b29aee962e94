import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from sources import folder
from sources.folder import read_image
from sources.image_file import ACCEPTED, MOST_PROFILES, MOST_SCANS, count_scans, kind_of

FOREIGN = {
    "AVIF": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "a video": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2",
    "TIFF": b"II*\0\x08\0\0\0",
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PDF": b"%PDF-1.7\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "an icon": b"\0\0\1\0\1\0\x10\x10",
    "something else": b"hello",
    "empty": b"",
}


def encoded(kind, side=32, **options):
    """A plain image as a file of some kind."""
    content = io.BytesIO()
    Image.new("RGB", (side, side), (90, 120, 40)).save(content, kind, **options)
    return content.getvalue()


def with_scans(content, more):
    """A progressive JPEG whose last scan stands there so many times more."""
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * more + content[-2:]


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_the_kinds_that_are_accepted_are_those_that_are_opened(tmp_path):
    assert set(ACCEPTED) == set(folder.IMAGE_FORMATS)
    for kind in ACCEPTED:
        assert kind_of(encoded(kind)) == kind
        (tmp_path / "image").write_bytes(encoded(kind))
        assert read_image(tmp_path / "image", 8).shape == (8, 8, 3)


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo"])
def test_a_file_of_another_kind_is_told_by_its_name_and_what_is_accepted(tmp_path, what, name):
    (tmp_path / name).write_bytes(FOREIGN[what])
    with pytest.raises(ValueError) as refusal:
        read_image(tmp_path / name, 32)
    reason = f"(it is {what}; accepted are PNG, JPEG, WEBP, BMP and GIF)"
    assert str(refusal.value) == f"{tmp_path / name} is no readable image {reason}"


@pytest.mark.parametrize("side", [64, 3000])
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path, side):
    content = encoded("JPEG", side, progressive=True)
    (tmp_path / "photo.jpg").write_bytes(with_scans(content, 1000))
    start = time.process_time()
    with pytest.raises(ValueError, match="1,010 scans, over 100"):
        read_image(tmp_path / "photo.jpg", 32)
    assert time.process_time() - start < 0.5


def test_scans_are_those_of_the_image_and_not_of_its_thumbnail_metadata_or_film(tmp_path):
    for options, scans in (({}, 1), ({"progressive": True}, 10)):
        content = encoded("JPEG", 64, **options)
        assert count_scans(content) == scans
        metadata = b"\xff\xe1" + struct.pack(">H", 2 + 20_000) + b"\xff\xda" * 9990 + b"\xff\xd9" * 10
        photo = content[:2] + metadata + content[2:] + b"\xff\xda" * 1000  # as a phone appends a film
        assert count_scans(photo) == scans
        (tmp_path / "photo.jpg").write_bytes(photo)
        assert np.abs(read_image(tmp_path / "photo.jpg", 32)[0, 0] - np.int64([90, 120, 40])).max() <= 1


def test_scans_cannot_be_hidden_behind_what_a_decoder_passes_over(tmp_path):
    content = encoded("JPEG", 64, progressive=True)
    last = content.rindex(b"\xff\xda")
    for between in (
        b"\xff\xff\xff",
        b"\xff\xd3",
        b"\xff\x01",
        b"\xff\0",
        b"junk",
        b"\xff\xfe\0\4\xff\xd9",
    ):
        many = content[:-2] + (between + content[last:-2]) * MOST_SCANS + content[-2:]
        (tmp_path / "photo.jpg").write_bytes(many)
        with pytest.raises(ValueError, match="110 scans, over 100"):
            read_image(tmp_path / "photo.jpg", 32)


def test_a_png_of_many_profiles_is_refused_before_they_are_unpacked(tmp_path):
    profile = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000), 9))
    content = encoded("PNG")
    for count in (1, MOST_PROFILES, 1000):
        (tmp_path / "photo.png").write_bytes(content[:33] + profile * count + content[33:])
        if count <= MOST_PROFILES:
            assert read_image(tmp_path / "photo.png", 32).shape == (32, 32, 3)
            continue
        start = time.process_time()
        with pytest.raises(ValueError, match="1,000 colour profiles, over 10"):
            read_image(tmp_path / "photo.png", 32)
        assert time.process_time() - start < 0.5


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt"])
def test_a_png_of_much_packed_text_is_refused_and_not_unpacked_for_ever(tmp_path, name):
    head = b"a\0\0" if name == b"zTXt" else b"a\0\1\0\0\0"
    text = png_chunk(name, head + zlib.compress(bytes(1_000_000), 9))
    content = encoded("PNG")
    (tmp_path / "photo.png").write_bytes(content[:33] + text * 1000 + content[33:])
    start = time.process_time()
    with pytest.raises(ValueError, match="no readable image"):
        read_image(tmp_path / "photo.png", 32)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_of_an_animation_the_first_frame_alone_is_decoded(tmp_path, kind):
    frames = [Image.new("RGB", (1500, 1500), (k, 0, 0)) for k in (200, 100, 0) * 4]
    seconds = []
    for name, others in (("still", []), ("moving", frames[1:])):
        frames[0].save(tmp_path / name, kind, save_all=bool(others), append_images=others)
        start = time.process_time()
        image = read_image(tmp_path / name, 8)
        seconds.append(time.process_time() - start)
        assert abs(int(image[4, 4, 0]) - 200) < 8
    assert seconds[1] < 4 * seconds[0] + 0.3
