"""Files of tensors: the same bytes for the same content, written whole or not at all,
and no damage goes unnoticed.
"""

import errno
import hashlib
import json
import math
import os
import string

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gipip.errors import DamagedFileError
from gipip.files import canonical_json, fingerprint, read_tensors, write_tensors

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
NAMES = st.text(string.ascii_letters + " ./-–λ", min_size=1, max_size=12)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), values, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def tensors(draw):
    """Any bits of any type, NaN and −0 among them; a scalar, a vector without elements
    and a view across memory too.
    """
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    count = math.prod(shape)
    if dtype == torch.bool:
        return torch.tensor(
            draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype
        ).reshape(shape)
    content = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    tensor = (
        torch.frombuffer(bytearray(content), dtype=dtype)
        if content
        else torch.empty(0, dtype=dtype)
    )
    return tensor.reshape(shape).movedim(0, -1) if shape else tensor.reshape(())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def tiny(path):
    write_tensors(
        path,
        {"x": torch.tensor([0.5, -1.5]), "n": torch.tensor([[1], [2]], dtype=torch.uint8)},
        {"of": "a test", "lr": 0.1},
    )
    return path


def same_bits(a, b):
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    )


def same_content(found, expected):
    (tensors, metadata), (others, other) = found, expected
    return (
        metadata == other
        and tensors.keys() == others.keys()
        and all(same_bits(tensors[name], others[name]) for name in tensors)
    )


# Round trip --------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(NAMES, tensors(), max_size=3),
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), JSON, max_size=3),
)
def test_what_was_written_is_read_bit_for_bit(tmp_path_factory, content, metadata):
    path = write_tensors(
        tmp_path_factory.getbasetemp() / "round-trip.safetensors", content, metadata
    )
    assert same_content(read_tensors(path), (content, metadata))


def test_equal_content_gives_equal_bytes_in_whatever_order_it_comes(tmp_path):
    content, metadata = {"b": torch.arange(3), "a": torch.rand(2, 2)}, {"x": 1, "y": [2.5, None]}
    paths = [write_tensors(tmp_path / f"{index}", content, metadata) for index in range(5)]
    paths.append(
        write_tensors(
            tmp_path / "reversed", dict(reversed(content.items())), dict(reversed(metadata.items()))
        )
    )
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_file_is_an_ordinary_safetensors_file_with_its_metadata_as_json(tiny):
    with safetensors.safe_open(tiny, framework="pt") as file:
        assert set(file.keys()) == {"x", "n"}
        assert json.loads(json.loads(file.metadata()["gipip"])["metadata"]) == {
            "of": "a test",
            "lr": 0.1,
        }


def test_missing_folders_are_made_and_an_older_file_is_replaced(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for value in (1, 2):
        assert write_tensors(path, {"x": torch.tensor(value)}, {}) == path
        assert read_tensors(str(path))[0]["x"] == value


# Damage ------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_no_altered_byte_goes_unnoticed(tiny, mask):
    """Most are damage; a few in the header may leave all content as it was."""
    content, expected = tiny.read_bytes(), read_tensors(tiny)
    detected = 0
    for place in range(len(content)):
        tiny.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
        try:
            assert same_content(read_tensors(tiny), expected), (
                f"byte {place} was altered without notice"
            )
        except DamagedFileError:
            detected += 1
    assert detected > 0.95 * len(content)


def test_a_file_cut_at_any_length_is_damaged(tiny):
    content = tiny.read_bytes()
    for length in range(len(content)):
        tiny.write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match="tiny.safetensors"):
            read_tensors(tiny)


def test_a_file_with_bytes_appended_is_damaged(tiny):
    tiny.write_bytes(tiny.read_bytes() + b"\0")
    with pytest.raises(DamagedFileError):
        read_tensors(tiny)


def test_the_message_says_what_to_do(tiny):
    tiny.write_bytes(tiny.read_bytes()[:-1] + b"\xff")  # the last byte of a tensor
    with pytest.raises(
        DamagedFileError,
        match="does not match its checksum.*Delete it and make or download it again",
    ):
        read_tensors(tiny)


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"gipip": "{}"}, {"gipip": '{"metadata":"{}"}'}]
)
def test_a_safetensors_file_that_is_not_by_gipip_is_refused(path, metadata):
    safetensors.torch.save_file({"x": torch.ones(1)}, path, metadata)
    with pytest.raises(DamagedFileError, match="is no readable safetensors file by gipip"):
        read_tensors(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a zip", b"\x80\x04K\x01.", "ünsinn".encode() * 50]
)
def test_a_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="no readable safetensors file"):
        read_tensors(path)


def test_a_missing_file_is_missing_and_not_damaged(path):
    with pytest.raises(FileNotFoundError):
        read_tensors(path)


# Interrupted writing -----------------------------------------------------------


def raises(error):
    def function(*arguments):
        raise error

    return function


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_writing_that_fails_leaves_the_older_file_and_nothing_else(
    tiny, monkeypatch, function, error
):
    before = tiny.read_bytes()
    monkeypatch.setattr(os, function, raises(error))
    with pytest.raises(type(error)):
        write_tensors(tiny, {"x": torch.ones(3)}, {})
    assert [path.name for path in tiny.parent.iterdir()] == [
        tiny.name
    ] and tiny.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_an_error_and_nothing_is_left(path):
    path.write_text("a file, not a folder")
    with pytest.raises(OSError):
        write_tensors(path / "below" / "x.safetensors", {}, {})
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_metadata_that_is_not_json_is_refused_before_anything_is_written(path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_tensors(path, {}, {"psnr": float("nan")})
    assert not list(path.parent.iterdir())


def test_until_all_is_written_there_is_no_file_under_the_final_name(path, monkeypatch):
    """So a crash at that moment leaves a hidden temporary file and no more."""
    seen, rename = [], os.replace

    def replace(source, target):
        seen.extend(found.name for found in path.parent.iterdir())
        assert read_tensors(source)[0]["x"] == 1
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_tensors(path, {"x": torch.ones(1)}, {})
    assert len(seen) == 1 and seen[0].startswith(".tiny.safetensors.") and seen[0].endswith(".tmp")
    assert [found.name for found in path.parent.iterdir()] == [path.name]


# Fingerprints ------------------------------------------------------------------


def test_a_fingerprint_is_the_sha256_of_text_names_types_shapes_and_bytes():
    x = torch.tensor([[1, 2]], dtype=torch.uint8)
    by_hand = hashlib.sha256(b"text" + b"\nx uint8 (1, 2)\n" + b"\x01\x02").hexdigest()
    assert fingerprint({"x": x}, "text") == by_hand
    assert fingerprint({}) == hashlib.sha256(b"").hexdigest()


def test_a_fingerprint_depends_on_names_types_shapes_content_and_text():
    x = torch.zeros(4)
    others = [
        {"y": x},
        {"x": x.int()},
        {"x": x.reshape(2, 2)},
        {"x": torch.tensor([0, 0, 0, -0.0])},
        {"x": x, "y": x},
        {},
    ]
    prints = [fingerprint(content) for content in [{"x": x}, *others]] + [
        fingerprint({"x": x}, "text")
    ]
    assert len(set(prints)) == len(prints)


def test_a_fingerprint_does_not_depend_on_the_order_the_memory_layout_or_gradients():
    x, y = torch.rand(2, 3), torch.rand(1)
    assert fingerprint({"x": x, "y": y}) == fingerprint(
        {"y": y.clone().requires_grad_(), "x": x.t().contiguous().t()}
    )


def test_canonical_json_is_one_text_for_equal_values():
    assert (
        canonical_json({"b": [1, 0.1, None], "a": {"d": "ü", "c": True}})
        == '{"a":{"c":true,"d":"\\u00fc"},"b":[1,0.1,null]}'
    )
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_canonical_json_refuses_numbers_that_are_not_finite(value):
    with pytest.raises(ValueError):
        canonical_json({"deep": [value]})
