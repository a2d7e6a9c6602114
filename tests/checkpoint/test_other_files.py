"""Files that are no pickles: each is named for what it is, with the next step, and nothing in it is read."""

from __future__ import annotations

import io
import mmap
import re
import struct
import tarfile
import zipfile

import pytest
from PIL import Image

import finetune
from finetune.errors import CheckpointError, PickleRefused


def zipped(name: str, content: bytes = b"x") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("network.pkl"))
    return stream.getvalue()


def image(file_format: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, file_format)
    return stream.getvalue()


HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(60)
OTHER_TENSORS = struct.pack("<Q", 60) + HEADER + bytes(4)
BFLOAT16 = OTHER_TENSORS.replace(b'"F32"', b'"BF16"').replace(b"[0,4]}}  ", b"[0,2]}} ")[:-2]
NOT_OURS = "not a safetensors file of this tool"
# name -> (content, what it is, what to do)
FILES = {
    "zip of images": (zipped("00000/img0.PNG"), "a zip archive of images", "--data"),
    "zip of a checkpoint": (zipped("a/ffhq.pkl"), "a zip archive with a checkpoint in it", "Unpack"),
    "zip of a .pt": (zipped("a/net.pt"), "a zip archive with a checkpoint in it", "Unpack"),
    "zip of arrays": (zipped("a.npy"), "numpy arrays (.npz)", ".safetensors"),
    "zip of texts": (zipped("a.txt"), "a zip archive", "Unpack"),
    "TorchScript": (zipped("net/constants.pkl"), "a TorchScript program", "checkpoint"),
    "zip cut off": (zipped("a.txt", bytes(500))[:300], "a zip archive that is damaged", "again"),
    "tar": (tarred(), "a tar archive", "Unpack"),
    "ONNX": (b"\x08\x0a\x12\x07pytorch", "an ONNX model", "exported from"),
    "JPEG": (image("JPEG"), "a JPEG image", "--data"),
    "PNG": (image("PNG"), "a PNG image", "--data"),
    "GIF": (image("GIF"), "a GIF image", "--data"),
    "WebP": (image("WEBP"), "a WebP image", "--data"),
    "TIFF": (image("TIFF"), "a TIFF image", "--data"),
    "bzip2": (b"BZh9" + bytes(20), "compressed", "Unpack"),
    "xz": (b"\xfd7zXZ\x00" + bytes(20), "compressed", "Unpack"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), "compressed", "Unpack"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(20), "a 7z or rar archive", "Unpack"),
    "PDF": (b"%PDF-1.7\n\xff" + bytes(20), "a PDF document", "again"),
    "numpy": (b"\x93NUMPY" + bytes(20), "a numpy array", ".safetensors"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file", ".safetensors"),
    "safetensors": (OTHER_TENSORS, NOT_OURS, "made from (.pkl or .pt)"),
    "safetensors of bfloat16": (BFLOAT16, NOT_OURS, "made from (.pkl or .pt)"),
}


@pytest.mark.parametrize("suffix", [".pkl", ".pt"])
@pytest.mark.parametrize("name", FILES)
def test_load_other_files_name_next_step(name, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(mmap, "mmap", None)  # only the beginning of the file is read
    data, what, hint = FILES[name]
    path = tmp_path / f"network{suffix}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(what)) as refusal:
        finetune.load(path)
    assert not isinstance(refusal.value, PickleRefused)
    assert str(path) in refusal.value.what and hint in refusal.value.hint
