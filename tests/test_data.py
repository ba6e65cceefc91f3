"""Reading images: IDX files, folders with broken files, fixed splits, augmentation."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_python

from fastvit.augment import Augment
from fastvit.data import load_data, read_idx
from fastvit.dataset import ImageFiles, Images, split_indices, statistics
from fastvit.errors import UsageError, need
from fastvit.image_folder import load_folder
from fastvit.read_image import read_image


def idx_bytes(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    return header + values.astype(np.uint8).tobytes()


def write_fashion(folder, train=60, test=20, suffix=".gz") -> None:
    """Write a data set in Fashion-MNIST's format; class c is bright in row 2 c."""
    rng = np.random.default_rng(0)
    pack = gzip.compress if suffix else bytes
    for stem, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 30, (count, 28, 28))
        images[np.arange(count), 2 * labels] = 255
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{stem}-{name}-ubyte{suffix}").write_bytes(pack(idx_bytes(values)))


def write_folder(root, classes=("cat", "dog"), count=10, size=(20, 24)) -> None:
    """Write one folder per class: class 0 is red, class 1 green, class 2 blue, with noise."""
    rng = np.random.default_rng(1)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (*size, 3), dtype=np.uint8)
            pixels[..., label] += 180
            Image.fromarray(pixels).save(root / name / f"{i}.png")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_reads_plain_and_gzipped(tmp_path, suffix):
    write_fashion(tmp_path, suffix=suffix)
    data = load_data(f"fashion-mnist:{tmp_path}")
    assert (len(data.train), len(data.val), len(data.test)) == (50, 10, 20)
    assert isinstance(data.test, Images)
    assert data.test.images.shape == (20, 1, 28, 28)
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]
    rows = data.test.images[:, 0].float().mean(2).argmax(1)
    assert torch.equal(rows, 2 * data.test.labels)


def test_read_idx_keeps_shape_and_order(tmp_path):
    values = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    (tmp_path / "x").write_bytes(idx_bytes(values))
    assert np.array_equal(read_idx(tmp_path / "x", 3), values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"\x89PNG" + raw[4:], "starts with 89504e47, expected 00000803"),
        (lambda raw: raw[:-1], "45 bytes, but its header"),
        (lambda raw: raw + b"x", "47 bytes, but its header"),
        (lambda raw: raw[:10], "truncated in its header, 10 of 16"),
        (lambda raw: b"", "starts with nothing"),
        (lambda raw: gzip.compress(raw)[:-12], "damaged gzip"),
    ],
    ids=["magic", "short", "long", "header", "empty", "gzip"],
)
def test_read_idx_names_what_is_wrong(tmp_path, damage, message):
    raw = idx_bytes(np.zeros((2, 3, 5)))
    (tmp_path / "x").write_bytes(damage(raw))
    with pytest.raises(UsageError, match=message):
        read_idx(tmp_path / "x", 3)


def test_fashion_mnist_with_a_missing_file_or_too_few_labels(tmp_path):
    write_fashion(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(idx_bytes(np.zeros(7)))
    with pytest.raises(UsageError, match="20 t10k images but 7 labels"):
        load_data(f"fashion-mnist:{tmp_path}")
    labels.write_bytes(idx_bytes(np.full(20, 10)))
    with pytest.raises(UsageError, match="label 10 is out of range"):
        load_data(f"fashion-mnist:{tmp_path}")
    labels.unlink()
    with pytest.raises(UsageError, match="holds no t10k-labels-idx1-ubyte"):
        load_data(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize("spec", ["", "digit", "digits:x", "folder", "folder:", "fashion-mnist"])
def test_bad_spec(spec):
    with pytest.raises(UsageError, match="--data must be digits, fashion-mnist:PATH"):
        load_data(spec)


def test_digits_splits_are_apart_complete_and_fixed():
    data = load_data("digits")
    splits = (data.train, data.val, data.test)
    assert [len(s) for s in splits] == [1259, 179, 359]
    assert data.describe().startswith("digits: 1,259 train, 179 validation and 359 test images")
    again = load_data("digits")
    torch.manual_seed(1234)  # splits do not depend on the seed
    for one, two in zip(splits, (again.train, again.val, again.test), strict=True):
        assert torch.equal(one.labels, two.labels)
    assert isinstance(data.train, Images) and data.train.images.max() == 255
    assert data.mean == pytest.approx([float(data.train.images.double().mean()) / 255])


def test_split_indices_partition_every_class():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 2 + [3])
    torch.manual_seed(5)
    parts = split_indices(labels)
    torch.manual_seed(6)
    assert all(map(torch.equal, parts, split_indices(labels)))
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(labels)))
    counts = [[int((labels[p] == c).sum()) for p in parts] for c in range(4)]
    assert counts == [[35, 5, 10], [1, 1, 1], [2, 0, 0], [1, 0, 0]]
    train, val, test = split_indices(labels, test_share=0.0)
    assert len(test) == 0 and len(train) + len(val) == len(labels)


def test_folder_one_tree(tmp_path):
    write_folder(tmp_path, ("cat", "dog", "emu"))
    (tmp_path / ".git").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._0.png").write_text("what macOS keeps of a file on other disks")
    data = load_data(f"folder:{tmp_path}", image_size=(16, 12), strict=True)
    assert data.classes == ("cat", "dog", "emu")
    assert [len(s) for s in (data.train, data.val, data.test)] == [21, 3, 6]
    assert isinstance(data.test, Images)
    assert data.test.images.shape == (6, 3, 16, 12)
    assert torch.equal(data.test.images.float().mean((2, 3)).argmax(1), data.test.labels)


@pytest.mark.parametrize("names", [("val",), ("test",), ("val", "test")], ids="+".join)
def test_folder_with_train_and_held_out(tmp_path, names):
    write_folder(tmp_path / "train", count=10)
    for name, count in zip(names, (3, 4), strict=False):
        write_folder(tmp_path / name, count=count)
    data = load_folder(tmp_path, (16, 16))
    sizes = [len(s) for s in (data.train, data.val, data.test)]
    assert sizes == ([20, 6, 8] if len(names) == 2 else [18, 2, 6])


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_words_for_the_held_out_folder(tmp_path, name, capsys):
    write_folder(tmp_path / "train", count=10)
    write_folder(tmp_path / name, count=3)
    data = load_folder(tmp_path, (16, 16))
    assert data.classes == ("cat", "dog")
    assert [len(s) for s in (data.train, data.val, data.test)] == [18, 2, 6]
    write_folder(tmp_path / "test", count=4)
    data = load_folder(tmp_path, (16, 16))
    assert [len(s) for s in (data.train, data.val, data.test)] == [20, 6, 8]
    assert not capsys.readouterr().err
    write_folder(tmp_path / "val", count=5)
    data = load_folder(tmp_path, (16, 16))
    assert [len(s) for s in (data.train, data.val, data.test)] == [20, 10, 8]
    assert capsys.readouterr().err == f"{tmp_path}: validation is val; not used: {name}\n"


@pytest.mark.parametrize("names", [("train", "dev"), ("train",), ("Train", "Val"), ("a", "b")])
def test_folders_of_folders_are_no_classes(tmp_path, names):
    for name in names:
        write_folder(tmp_path / name)
    if names == ("train",):  # beside folders that could be classes
        write_folder(tmp_path, ("extra", "more"))
    with pytest.raises(UsageError, match=f"'{names[0]}' holds folders, not images; expected"):
        load_folder(tmp_path)


def test_a_class_may_hold_subfolders_and_links_to_them(tmp_path):
    write_folder(tmp_path / "data", count=4)
    write_folder(tmp_path / "elsewhere", ("cats", "kittens"), count=2)
    (tmp_path / "data/cat/sub").mkdir()
    (tmp_path / "data/cat/0.png").rename(tmp_path / "data/cat/sub/0.png")
    (tmp_path / "data/cat/more").symlink_to(tmp_path / "elsewhere" / "cats")
    (tmp_path / "data/cat/twice").symlink_to(tmp_path / "elsewhere" / "cats")
    (tmp_path / "elsewhere/cats/round").symlink_to(tmp_path / "data" / "cat")  # a cycle
    (tmp_path / "data/cat/gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data/emu").symlink_to(tmp_path / "elsewhere" / "kittens")
    data = load_folder(tmp_path / "data", memory_limit=0)
    labels = torch.cat([s.labels for s in (data.train, data.val, data.test)])
    assert data.classes == ("cat", "dog", "emu") and labels.bincount().tolist() == [6, 4, 2]


def test_folder_class_unknown_in_training(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", ("cat", "eel"))
    with pytest.raises(UsageError, match="class 'eel' is not among"):
        load_folder(tmp_path)


def test_the_names_of_all_files_have_a_digest(tmp_path):
    write_folder(tmp_path / "data")
    before = load_folder(tmp_path / "data", (8, 8)).files
    (tmp_path / "data").rename(tmp_path / "moved")
    streamed = load_folder(tmp_path / "moved", (16, 16), memory_limit=0)
    assert before and streamed.files == before
    (tmp_path / "moved" / "cat").rename(tmp_path / "moved" / "emu")
    assert load_folder(tmp_path / "moved", (8, 8)).files != before
    assert load_data("digits").files == ""


def break_one(root):
    """Cut one image in half and give another the wrong content."""
    victims = [root / "cat" / "3.png", root / "dog" / "4.png"]
    victims[0].write_bytes(victims[0].read_bytes()[:300])
    victims[1].write_text("hello")
    return victims


def test_broken_images_are_named_counted_and_skipped(tmp_path, capsys):
    write_folder(tmp_path)
    victims = break_one(tmp_path)
    data = load_folder(tmp_path, (16, 16))
    errors = capsys.readouterr().err
    for victim in victims:
        assert f"skipped: {victim}: cannot be read as an image" in errors
    assert "skipped 2 of 20 files" in errors
    assert data.skipped == 2
    assert sum(len(s) for s in (data.train, data.val, data.test)) == 18


def test_strict_stops_at_a_broken_image(tmp_path):
    write_folder(tmp_path)
    break_one(tmp_path)
    with pytest.raises(UsageError, match=r"\.png: cannot be read as an image.*--strict"):
        load_folder(tmp_path, (16, 16), strict=True)


def test_streamed_folder_gives_the_batches_of_one_in_memory(tmp_path, capsys):
    write_folder(tmp_path)
    break_one(tmp_path)
    loaded = load_folder(tmp_path, (16, 16))
    streamed = load_folder(tmp_path, (16, 16), memory_limit=0)
    assert isinstance(streamed.train, ImageFiles) and isinstance(loaded.train, Images)
    capsys.readouterr()
    before = torch.get_rng_state()
    for name in ("train", "val", "test"):
        split = getattr(streamed, name)
        for _ in range(2):
            batches = list(split.batches(torch.arange(len(split)), 4))
            images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
            expected = getattr(loaded, name)
            assert torch.equal(images, expected.images) and torch.equal(labels, expected.labels)
    assert torch.equal(torch.get_rng_state(), before)
    assert streamed.skipped == 2
    assert capsys.readouterr().err.count("skipped:") <= 2  # each named once, not each epoch


def test_streaming_by_worker_processes(tmp_path):
    write_folder(tmp_path, count=4)
    streamed = load_folder(tmp_path, (16, 16), workers=1, memory_limit=0)
    images, labels = next(streamed.train.batches(torch.tensor([1, 0]), 2))
    alone = load_folder(tmp_path, (16, 16), workers=0, memory_limit=0)
    expected, expected_labels = next(alone.train.batches(torch.tensor([1, 0]), 2))
    assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_large_batches_of_few_open_files(tmp_path):
    """A worker sends a batch, not its images one by one: each tensor takes an open file."""
    write_folder(tmp_path, ("a", "b"), count=100)
    code = (
        "import resource, sys, torch; from pathlib import Path; import fastvit.image_folder as d\n"
        "data = d.load_folder(Path(sys.argv[1]), (8, 8), workers=1, memory_limit=0)\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "split = data.train\n"
        "print(*(len(x) for x, y in split.batches(torch.arange(len(split)), 512)), len(split))"
    )
    done = run_python(code, str(tmp_path))
    count, total = done.stdout.split()
    assert count == total and int(count) > 100, done.stderr


def test_bad_folders(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="found none"):
        load_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UsageError, match="found only 'cat'"):
        load_folder(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UsageError, match="no images"):
        load_folder(tmp_path)
    (tmp_path / "dog" / "a.png").write_text("broken")
    with pytest.raises(UsageError, match="'cat' has no images"):
        load_folder(tmp_path)
    (tmp_path / "cat" / "a.png").write_text("broken")
    with pytest.raises(UsageError, match="too few images for a validation split"):
        load_folder(tmp_path)
    for name in ("cat", "dog"):
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_text("broken")
    for limit in (0, 1 << 30):
        with pytest.raises(UsageError, match="no image of the training split could be read"):
            load_folder(tmp_path, memory_limit=limit)


def test_read_image_stands_upright_and_is_cropped_not_squeezed(tmp_path):
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, 13:27] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation: rotate by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png", (12, 4))
    assert image.shape == (3, 12, 4)
    assert image[0, 6].min() == 200 and image[0, 0].max() < 30 and image[0, -1].max() < 30
    assert read_image(tmp_path / "a.png", (5, 5), channels=1).min() == 200
    assert read_image(tmp_path / "a.png", (5, 5), channels=1, invert=True).max() == 55


def test_statistics():
    images = torch.randint(0, 256, (300, 2, 3, 5), dtype=torch.uint8)
    mean, std = statistics(Images(images, torch.zeros(300)))
    x = images.double() / 255
    assert mean == pytest.approx(x.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(x.std((0, 2, 3), correction=0).tolist())
    white = Images(torch.full_like(images, 255), torch.zeros(300))
    assert statistics(white) == ((1.0, 1.0), pytest.approx((1e-3, 1e-3)))  # no division by 0


def test_images_made_smaller_keep_a_share_of_every_pixel():
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    images[..., 0, 0] = 255
    assert Images(images, torch.zeros(1)).resized((2, 2)).images[0, 0, 0, 0] > 0


def test_augment_moves_flips_and_repeats():
    images = torch.rand(64, 1, 8, 12)
    generator = torch.Generator().manual_seed(3)
    still = Augment()(images, generator)
    torch.testing.assert_close(still, images)
    flipped = Augment(flip=True)(images, generator)
    mirrored = (flipped - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    kept = (flipped - images).abs().amax((1, 2, 3)) < 1e-5
    assert (mirrored ^ kept).all() and 15 < mirrored.sum() < 49
    everything = Augment(flip=True, shift=0.1, rotate=10, scale=0.1)
    one, two = (everything(images, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one, two) and not torch.allclose(one, images)
    dots = torch.zeros(64, 1, 9, 9)
    dots[:, :, 4, 4] = 1
    moved = Augment(shift=0.2, padding="zeros")(dots, generator).flatten(1).argmax(1)
    offsets = torch.stack([moved // 9, moved % 9]) - 4
    assert offsets.abs().max() == 2 and offsets.unique().numel() == 5


def test_a_rotated_square_stays_square_on_a_wide_image():
    image = torch.zeros(1, 1, 40, 80)
    image[:, :, 10:30, 30:50] = 1
    turned = Augment(rotate=45.0)(image.expand(50, -1, -1, -1), torch.Generator().manual_seed(0))
    assert turned.sum((1, 2, 3)).sub(400).abs().max() < 8  # a stretch would change the area
    heights = (turned.amax((1, 3)) > 0.5).sum(1)
    widths = (turned.amax((1, 2)) > 0.5).sum(1)
    assert (heights - widths).abs().max() <= 1


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("fastvit.errors.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"scikit-learn; install.*pip install 'fastvit\[train\]'"):
        load_data("digits")
    with pytest.raises(UsageError, match="a needs pillow and tqdm"):
        need("a", "PIL", "tqdm")


def test_deep_pixels_are_scaled_or_refused(tmp_path):
    """Pillow's own conversion clips: 16-bit pixels turn all white, floats in 0..1 all black."""
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / name)
        for channels in (1, 3):
            pixels = read_image(tmp_path / name, (64, 64), channels).float()
            expected = torch.from_numpy(ramp / 257).float().expand_as(pixels)
            assert (pixels - expected).abs().max() <= 1, (name, channels)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.png", "turned.tif"):
        Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / name, exif=exif)
        assert read_image(tmp_path / name, (64, 64))[0, 0, 0] > 200, name
    for dtype in (np.float32, np.int32):
        Image.fromarray((ramp / 65535).astype(dtype)).save(tmp_path / "b.tif")
        with pytest.raises(UsageError, match="which has no white; save it as 8 bits"):
            read_image(tmp_path / "b.tif", (64, 64))
