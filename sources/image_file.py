"""What kind of image a file is, and whether it costs far more to read than its pixels are worth."""

import re
from pathlib import Path

# The kinds that are read, and others that people try, by their first bytes.
ACCEPTED = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM",
    "GIF": rb"GIF8[79]a",
}
OTHERS = {
    "AVIF": rb".{4}ftypavi[fs]",
    "HEIC": rb".{4}ftyp(hei[cxms]|hev[cx]|mif1|msf1)",
    "a video": rb".{4}ftyp",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "an icon": rb"\0\0[\x01\x02]\0",
    "PostScript": rb"%!PS",
    "PDF": rb"%PDF",
    "Photoshop's": rb"8BPS",
    "SVG": rb"(\xef\xbb\xbf)?\s*<(.*<)?svg[\s>]",
}
MOST_SCANS = 100  # of a JPEG: every scan passes over all pixels again; cameras write 1, editors about 10
MOST_PROFILES = 10  # of a PNG, which may have one: each is unpacked, to a thousand times its size
MARKER = re.compile(rb"\xff+([^\x00\xff])")  # of a JPEG, as libjpeg finds the next one


def check_image_file(path: str | Path) -> None:
    """Refuse a file that is no image of the accepted kinds, or that takes minutes to read.

    Raises:
        ValueError: says what the file is instead, and which kinds are accepted; or what is too much.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        start = file.read(1024)
        kind = kind_of(start)
        if kind not in ACCEPTED:
            *most, last = ACCEPTED
            what = f"it is {kind}" if kind else "it is empty" if not start else "it is something else"
            raise ValueError(f"{what}; accepted are {', '.join(most)} and {last}")
        content = start + file.read() if kind in ("JPEG", "PNG") else b""
    if kind == "JPEG" and (scans := count_scans(content)) > MOST_SCANS:
        raise ValueError(f"{scans:,} scans, over {MOST_SCANS}")
    if kind == "PNG" and (profiles := content.count(b"iCCP")) > MOST_PROFILES:
        raise ValueError(f"{profiles:,} colour profiles, over {MOST_PROFILES}")


def kind_of(start: bytes) -> str:
    """The name of the kind of file that begins like this, or an empty string."""
    kinds = ACCEPTED | OTHERS
    return next((name for name, first in kinds.items() if re.match(first, start, re.DOTALL)), "")


def count_scans(content: bytes) -> int:
    """How many scans a decoder of this JPEG would meet; thumbnails and what follows do not count."""
    scans, place = 0, 2
    while marker := MARKER.search(content, place):
        place, code = marker.end(), marker[1][0]
        if code == 0xD9:  # the end of the image
            break
        if 0xD0 <= code <= 0xD8 or code == 0x01:  # these have no length
            continue
        scans += code == 0xDA
        place += int.from_bytes(content[place : place + 2], "big")
    return scans
