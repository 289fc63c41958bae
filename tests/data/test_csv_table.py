"""A CSV table of image files: its columns and parts, and every way to be wrong."""

import shutil

import pytest
import torch
from test_folder import CLASSES, images, read, write_images

from exitkit.data.base import build_dataset
from exitkit.data.csv_table import ImageTable
from exitkit.errors import UserError

SETTINGS = {"image_size": 16, "workers": 0}


@pytest.fixture
def table(tmp_path):
    """A table beside its images: 10 of each class to train on, 4 to test on."""
    rows = ["path,label,split,photographer"]
    for part, count in (("train", 10), ("test", 4)):
        write_images(tmp_path / part, dict.fromkeys(CLASSES, count), seed=count)
        rows += [
            f"{path.relative_to(tmp_path)},{path.parent.name},{part},me"
            for path in sorted(tmp_path.rglob(f"{part}/*/*"))
        ]
    (tmp_path / "birds.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "birds.csv"


def named(table, **given):
    return build_dataset(f"csv:{table}", SETTINGS | given)


def test_a_table_gives_what_its_folders_give(table):
    from exitkit.data.folder import ImageFolder

    ours, folders = named(table).load(None), ImageFolder(**SETTINGS).load(table.parent)
    assert ours.class_names == folders.class_names and ours.input_shape == (3, 16, 16)
    for part in ("train", "validation", "test"):
        assert torch.equal(ours.labels(part), folders.labels(part))
        assert torch.equal(images(read(ours, part)), images(read(folders, part)))


def test_parts_are_drawn_without_a_column_of_parts_and_given_with_one(table):
    text = table.read_text()
    table.write_text("\n".join(",".join(line.split(",")[:2]) for line in text.splitlines()))
    sizes = [len(named(table).load(None).labels(part)) for part in ("train", "validation", "test")]
    assert sizes == [31, 3, 8]
    lines = text.splitlines()
    for row in (1, 11, 21):  # the first of each class
        lines[row] = lines[row].replace(",train,", ",Valid,")
    table.write_text("\n".join(lines))
    sizes = [len(named(table).load(None).labels(part)) for part in ("train", "validation", "test")]
    assert sizes == [27, 3, 12]
    drawn = named(table, validation=6).load(None)  # instead of the given part
    assert [len(drawn.labels(part)) for part in ("train", "validation", "test")] == [21, 6, 12]
    assert len(drawn.train_source.paths) == len(drawn.train_labels) == 27


def test_labels_that_are_numbers_are_ordered_as_numbers(table):
    text = table.read_text()
    for name, number in zip(CLASSES, ("10", "9", "-1"), strict=True):
        text = text.replace(f",{name},", f",{number},")
    table.write_text("\ufeff" + text)
    data = named(table).load(None)
    assert data.class_names == ["-1", "9", "10"]
    assert torch.bincount(data.labels("test")).tolist() == [4, 4, 4]


def test_labels_of_one_number_are_classes_in_one_order_and_blanks_around_labels_do_not_count(table):
    text = table.read_text()
    for name, label in (("ant", "01"), ("bee", "1"), ("cow", " 1.0 ")):
        text = text.replace(f",{name},", f",{label},")
    table.write_text(text)
    assert named(table).load(None).class_names == ["01", "1", "1.0"]
    table.write_text(text.replace(", 1.0 ,", ",-0,").replace(",1,", ",0,"))
    assert named(table).load(None).class_names == ["-0", "0", "01"]


def test_a_table_is_known_by_its_rows_and_images_wherever_it_is(table, tmp_path):
    known = named(table).digest(None)
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    assert named(table).digest(moved) == known and named(table).digest(moved / "train") is None
    (moved / table.name).write_text(table.read_text().replace("ant,train", "bee,train", 1))
    changed = named(table).digest(moved)
    shutil.copy(table, moved)
    (moved / "test" / "ant" / "00.png").write_bytes((moved / "test" / "ant" / "01.png").read_bytes())
    assert len({known, changed, named(table).digest(moved)}) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("path,label", "file,label"), "has no column path .its columns are file, label, sp"),
        (lambda text: "", "is not a CSV table: No columns"),
        (lambda text: text + "a,b,c,d,e\n", "is not a CSV table: Error tokenizing"),
        (lambda text: text.replace(",me\n", ",me,x\n"), "is not a CSV table: rows have more cells than the header"),
        (lambda text: text.replace(",ant,", ",ant, red,"), "rows have more cells than the header; expected quotes"),
        (lambda text: text.replace(",ant,", ",,", 1), "line 2: label is empty"),
        (lambda text: text.replace("ant/00.png", "ant/01.png", 1), "lists train/ant/01.png twice, in lines 2 and 3"),
        (lambda text: text.replace("\n", "\n\n\n", 1).replace(",ant,", ",,", 1), "line 4: label is empty"),
        (lambda text: text.replace(",ant,", ',"a\nb",', 1).replace(",bee,", ",,", 1), "line 13: label is empty"),
        (lambda text: text.replace(",train,", ",trian,", 1), "line 2: unknown split 'trian'; did you mean train"),
        (lambda text: text.replace(",train,", ",test,"), "lists no training images"),
        (lambda text: text.replace(",cow,test,", ",cat,test,", 1), "cat is a label of test images, and of no training"),
        (lambda text: text.replace(",bee,", ",ant,").replace(",cow,", ",ant,"), "has 1 class; expected at least 2"),
        (lambda text: text.replace("bee/02.png", "bee/20.png", 1), "image .*train/bee/20.png "),
    ],
)
def test_tables_that_are_not_right_are_refused_in_one_line(table, change, words):
    table.write_text(change(table.read_text()))
    with pytest.raises(UserError, match=words) as caught:
        named(table).load(None).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", [",\n", ",,\n"])
def test_commas_at_the_end_of_rows_are_no_cells(table, end):
    expected = named(table).load(None)
    head, rows = table.read_text().split("\n", 1)
    table.write_text(f"{head}\n{rows.replace(chr(10), end)}")
    data = named(table).load(None)
    assert data.class_names == expected.class_names
    assert torch.equal(data.labels("train"), expected.labels("train"))


def test_a_table_is_named_and_exists(tmp_path):
    with pytest.raises(UserError, match="expected --dataset csv:FILE"):
        ImageTable().load(None)
    with pytest.raises(UserError, match=r"nowhere.csv can't be read: No such file"):
        named(tmp_path / "nowhere.csv").load(None)


def test_a_table_is_trained_on_and_evaluated_by_the_command_line(table, cli):
    options = ("--backbone", "msdnet-tiny", "--epochs", "1", "--batch-size", "16", "--set", "workers=0")
    done = cli("train", "--dataset", f"csv:{table}", "--set", "image_size=16", *options)
    assert done.code == 0, done.errors
    (run,) = (table.parent / "runs").iterdir()
    moved = table.rename(table.parent / "train" / "birds.csv")
    assert cli("evaluate", run).code == 0  # the run has its own table of images
    moved.rename(table)
    table.write_text(table.read_text().replace("ant,test", "bee,test", 1))
    again = cli("evaluate", run)
    assert again.code == 0 and "gives 1 of the run's images another label" in " ".join(again.errors.split())
