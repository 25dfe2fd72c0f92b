"""Boxes: from the rows to the notation of a model family after the resize, and back from its answers."""

import json
from dataclasses import replace

import pytest
import torch
from build import FAMILY, picture, row, write_image, write_json
from PIL import Image as PIL
from transformers import Qwen2VLImageProcessor

from vlft.chat import Chat, open_model, question
from vlft.cli.main import main
from vlft.config.recipe import Recipe
from vlft.data.boxes import boxes_in_answer, remarks
from vlft.data.costs import cache as cost_cache
from vlft.data.encode import Encoder
from vlft.data.files.index import index_rows
from vlft.data.media.read import measure
from vlft.data.rows.coordinates import BoxText, NotABox, PictureSizes, fault, split, to_model, to_original
from vlft.data.rows.records import parse_record
from vlft.data.sample import Grid
from vlft.errors import DataError

#: How Qwen2.5-VL and Qwen3-VL want them.
LATER = replace(FAMILY, box_unit="pixels", box_style="json")
THIRD = replace(FAMILY, box_unit="0-1000", box_style="json")

# ms-swift's documentation (Custom-dataset.md, "Grounding") shows three rows both ways: boxes of the original under
# "objects", and what Qwen2-VL is given. The sizes of the pictures follow from the numbers.
PUBLISHED = [
    ((1500, 1800), [331.5, 761.4, 853.5, 1594.8], "(221,423),(569,886)"),
    ((1500, 1800), [676.5, 685.8, 1099.5, 1427.4], "(451,381),(733,793)"),
    ((900, 800), [90.9, 160.8, 135, 212.8], "(101,201),(150,266)"),
    ((900, 800), [360.9, 480.8, 495, 532.8], "(401,601),(550,666)"),
    ((2500, 2000), [615, 226], "(246,113)"),
]


def parse(raw, folder, index=0):
    return parse_record(raw, file="rows.json", index=index, image_folder=str(folder), family=FAMILY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """wide.jpg 700x300; tall.png 120x400; small.jpg 90x60; twin.jpg as wide; turned.jpg, 400x120 displayed 120x400."""
    folder = tmp_path_factory.mktemp("pictures")
    write_image(folder / "wide.jpg", 700, 300)
    write_image(folder / "twin.jpg", 700, 300, name="coffee")
    write_image(folder / "tall.png", 120, 400, name="rocket")
    write_image(folder / "small.jpg", 90, 60)
    exif = PIL.Exif()
    exif[0x0112] = 6
    picture(400, 120, name="coffee").save(folder / "turned.jpg", exif=exif)
    return folder


def said(encoder: Encoder, raw: dict, folder) -> str:
    """The answer the model is trained on, as text."""
    encoded = encoder.encode(parse(raw, folder))
    trained = encoded.labels_T[encoded.labels_T != -100]
    return encoder.processor.tokenizer.decode(trained.tolist(), skip_special_tokens=False).removesuffix("<|im_end|>")


def grounded(box, *, images="wide.jpg", **objects) -> dict:
    tags = "<image>" * (1 if isinstance(images, str) else len(images))
    objects = {"ref": ["a cup"], "bbox": [box]} | objects
    return row(f"{tags}\nFind the <ref-object>.", "Here: <bbox>!", image=images, objects=objects)


# ---- numbers


@pytest.mark.parametrize(("size", "box", "theirs"), PUBLISHED)
def test_numbers_published_for_qwen2_vl(size, box, theirs):
    sizes = PictureSizes(original=size[::-1], shown=(28, 28))
    assert str(BoxText(numbers=to_model(box, "pixels", "0-1000", sizes), form="points")) == theirs
    [_, found, _] = split(f"<|box_start|>{theirs}<|box_end|>")
    assert to_original(found.numbers, "0-1000", sizes) == pytest.approx(box, abs=max(size) / 1000)


@pytest.mark.parametrize("unit", ["0-1000", "pixels"])
@pytest.mark.parametrize("given", ["pixels", "0-1000", "0-1"])
def test_there_and_back_within_one_unit(given, unit):
    draw = torch.Generator().manual_seed(7)
    for _ in range(300):
        h, w, sh, sw = torch.randint(20, 4000, (4,), generator=draw).tolist()
        sizes = PictureSizes(original=(h, w), shown=(sh, sw))
        shares = torch.rand(4, generator=draw, dtype=torch.float64).tolist()
        sides = {"pixels": (w, h, w, h), "0-1000": (1000,) * 4, "0-1": (1,) * 4}[given]
        numbers = [share * side for share, side in zip(shares, sides, strict=True)]
        model = to_model(numbers, given, unit, sizes)
        assert all(isinstance(number, int) for number in model)
        units = (1000,) * 4 if unit == "0-1000" else (sw, sh, sw, sh)
        for share, pixel, one, side in zip(shares, to_original(model, unit, sizes), units, (w, h, w, h), strict=True):
            assert abs(pixel - share * side) <= side / one  # one of the model's units, in pixels of the original


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("a<|box_start|>(1,2),(30,40)<|box_end|>b", [(1, 2, 30, 40)]),
        ("<|box_start|> ( 1 , 2.5 ) , (30, 40) <|box_end|>", [(1, 2.5, 30, 40)]),
        ("<|box_start|>(1,2)(3,4)<|box_end|><|box_start|>(5,6)<|box_end|>", [(1, 2, 3, 4), (5, 6)]),
        ("<|quad_start|>(1,2),(3,4),(5,6),(7,8)<|quad_end|>", [tuple(range(1, 9))]),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "x"}, {"point_2d": [-5,6]}', [(1, 2, 3, 4), (-5, 6)]),
        ("{'bbox_2d':[0.1,0.2,0.3,0.4]}", [(0.1, 0.2, 0.3, 0.4)]),
        ('Answer as {"bbox_2d": [x1, y1, x2, y2]} or <|box_start|>(x1,y1),(x2,y2)<|box_end|>.', []),
        ("bbox_2d [1, 2, 3, 4], (1,2),(3,4)", []),
    ],
)
def test_boxes_are_found_in_text(text, numbers):
    pieces = split(text)
    assert [piece.numbers for piece in pieces if isinstance(piece, BoxText)] == numbers
    kept = "".join(piece for piece in pieces if isinstance(piece, str))
    assert kept == text or numbers
    written = "".join(map(str, pieces))
    assert [piece.numbers for piece in split(written) if isinstance(piece, BoxText)] == numbers


@pytest.mark.parametrize(
    "text",
    [
        "<|box_start|>(1,2),(3)<|box_end|>",
        "<|box_start|>1,2,3,4<|box_end|>",
        "<|quad_start|>(1,2),(3,4)<|quad_end|>",
        '"bbox_2d": [1, 2, 3]',
        '"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]]',
        '"point_2d": [1, 2, 3, 4]',
    ],
)
def test_what_is_no_box_is_said(text):
    with pytest.raises(NotABox, match="is not a box"):
        split(text)
    assert split(text, lenient=True) == [text]


@pytest.mark.parametrize(
    ("box", "given", "says"),
    [
        ((10, 20, 640, 480), "pixels", None),
        ((0, 0, 1, 1), "0-1", None),
        (
            (10, 20, 645, 480),
            "pixels",
            "box 10,20,645,480 (pixels) leaves the picture, which ends at 640,480. It is clipped",
        ),
        ((10, 20, 800, 480), "pixels", "ends at 640,480. It is trained as written"),
        ((10, 20, 1200, 480), "0-1000", "ends at 1000,1000. It is trained as written"),
        ((-0.5, 0, 1, 1), "0-1", "ends at 1,1. It is trained as written"),
        ((100, 20, 90, 480), "pixels", "is empty: 90,480 is not right of and below 100,20"),
        ((700, 20), "pixels", "box 700,20 (pixels) leaves the picture"),
    ],
)
def test_odd_boxes_are_told_with_both_values(box, given, says):
    told = fault(box, given, (480, 640))
    assert told is None if says is None else says in told


def test_a_small_overshoot_is_clipped_and_a_large_one_is_not():
    sizes = PictureSizes(original=(480, 640), shown=(280, 364))
    assert to_model((-3, 0, 645, 484), "pixels", "0-1000", sizes) == (0, 0, 1000, 1000)
    assert to_model((-64, 0, 704, 480), "pixels", "0-1000", sizes) == (-100, 0, 1100, 1000)


# ---- rows


def test_published_rows_become_what_they_are_published_as(encoder, tmp_path):
    """Boxes and names from `objects` are written in Qwen2-VL's tokens."""
    for i, (size, _, _) in enumerate(PUBLISHED):
        write_image(tmp_path / f"{i}.jpg", *size)
    two = {"ref": ["a dog", "a woman"], "bbox": [PUBLISHED[0][1], PUBLISHED[1][1]]}
    pair = row("<image>Who?", "<ref-object><bbox> with <ref-object><bbox>", image="0.jpg", objects=two)
    assert said(encoder, pair, tmp_path) == (
        "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(221,423),(569,886)<|box_end|> with "
        "<|object_ref_start|>a woman<|object_ref_end|><|box_start|>(451,381),(733,793)<|box_end|>"
    )
    point = row("<image>Where?", "click('<bbox>')", image="4.jpg", objects={"ref": [], "bbox": [PUBLISHED[4][1]]})
    assert said(encoder, point, tmp_path) == "click('<|box_start|>(246,113)<|box_end|>')"


@pytest.mark.parametrize("images", ["wide.jpg", "tall.png", "turned.jpg"])
@pytest.mark.parametrize("family", [FAMILY, LATER, THIRD], ids=["tokens", "resized", "json"])
def test_every_way_to_write_a_box_trains_the_same(encoder, folder, family, images):
    """It refers to the picture as displayed, in the size after the stock processor's resize."""
    encoder = replace(encoder, family=family)
    width, height = (700, 300) if images == "wide.jpg" else (120, 400)
    shares = (0.25, 0.5, 0.75, 0.9)
    pixels = [share * side for share, side in zip(shares, (width, height) * 2, strict=True)]
    stock = Qwen2VLImageProcessor(size=encoder.processor.image_processor.size)
    upright = picture(width, height)
    _, h, w = stock(images=[upright], return_tensors="pt").image_grid_thw[0].tolist()
    wanted = [round(s * side) for s, side in zip(shares, (14 * w, 14 * h) * 2, strict=True)]
    if family.box_unit == "0-1000":
        wanted = [250, 500, 750, 900]
    elif images == "wide.jpg":
        assert wanted[0] != pixels[0]  # it is resized

    if family.box_style == "tokens":
        form = "<|box_start|>({:g},{:g}),({:g},{:g})<|box_end|>"
    else:
        form = '{{"bbox_2d": [{:g}, {:g}, {:g}, {:g}]}}'
    answer = f"Here: {form.format(*wanted)}!"
    for box_format, numbers in (("pixels", pixels), ("0-1", shares), ("0-1000", [1000 * s for s in shares])):
        one = replace(encoder, recipe=replace(encoder.recipe, box_format=box_format))
        raw = row("<image>Find it.", f"Here: {form.format(*numbers)}!", image=images)
        assert said(one, raw, folder) == answer
        assert said(encoder, raw, folder) == raw["conversations"][1]["value"]
    mark = "<bbox>" if family.box_style == "tokens" else '{"bbox_2d": <bbox>}'
    for kind, numbers in (("real", pixels), ("norm1", list(shares))):
        raw = grounded(numbers, images=images, bbox_type=kind)
        raw["conversations"][1]["value"] = f"Here: {mark}!"
        assert said(encoder, raw, folder) == answer
        asked = encoder.encode(parse(raw, folder)).text
        named = "<|object_ref_start|>a cup<|object_ref_end|>" if family.box_style == "tokens" else "a cup"
        assert f"Find the {named}." in asked


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned"])
@pytest.mark.parametrize("unit", ["pixels", "0-1000"])
def test_the_box_holds_what_it_held(encoder, tmp_path, unit, turned):
    """The pixels prove it: a red patch of the original is in the same box of the picture that the model receives."""
    box = (160, 420, 330, 700)
    shown = picture(500, 900, name="coffee")
    shown.paste((255, 0, 0), box)
    exif = PIL.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    if turned:
        shown.transpose(PIL.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    else:
        shown.save(tmp_path / "a.png")
    encoder = replace(encoder, family=replace(LATER, box_unit=unit))
    raw = grounded(list(box), images="a.png")
    [_, found, _] = split(said(encoder, raw, tmp_path).replace("Here: ", '"bbox_2d": '))
    pixels = encoder.encode(parse(raw, tmp_path)).media[0].pixels[0].float()
    height, width, _ = pixels.shape
    assert (width, height) not in ((500, 900), (900, 500)), "it is resized"
    sides = (1, 1, 1, 1) if unit == "pixels" else (width / 1000, height / 1000) * 2
    x1, y1, x2, y2 = (round(number * side) for number, side in zip(found.numbers, sides, strict=True))
    red = (pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(-1)
    inside = torch.zeros_like(red)
    inside[y1:y2, x1:x2] = True
    assert red[inside].float().mean() > 0.97
    assert red[~inside].float().mean() < 0.01


def test_the_picture_of_a_box(encoder, folder):
    """By image_id; else the picture right before it in its turn, the latest picture, or the row's only picture."""
    encoder = replace(encoder, family=LATER, recipe=replace(encoder.recipe, box_format="pixels"))
    both = ["wide.jpg", "tall.png"]
    first = said(encoder, grounded([60, 150, 120, 300], images=both, image_id=[0]), folder)
    second = said(encoder, grounded([60, 150, 120, 300], images=both, image_id=[1]), folder)
    alone = [said(encoder, grounded([60, 150, 120, 300], images=image), folder) for image in both]
    assert [first, second] == alone
    assert first != second
    assert said(encoder, grounded([60, 150, 120, 300], images=both), folder) == first  # ms-swift's default

    box = '{"bbox_2d": [60, 150, 120, 300]}'
    ours = [split(answer.replace("Here: ", '"bbox_2d": '))[1].numbers for answer in (first, second)]

    def numbers(*turns):
        said = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(turns)]
        text = encoder.encode(parse({"image": both, "conversations": said}, folder)).text
        return [piece.numbers for piece in split(text) if isinstance(piece, BoxText)]

    assert numbers(f"<image>{box}", box, "Again?", box, f"And <image>{box}", box) == [ours[0]] * 3 + [ours[1]] * 2
    assert numbers(f"<image>{box} and <image>{box}", "Well.") == ours
    only = row(f"{box} in <image>", box, image="tall.png")  # before the picture
    assert said(encoder, only, folder) == f'{{"bbox_2d": {second.removeprefix("Here: ").removesuffix("!")}}}'
    same = row("<image><image>Where?", box, image=["wide.jpg", "twin.jpg"])  # one size, so it does not matter
    assert said(encoder, same, folder) == f'{{"bbox_2d": {first.removeprefix("Here: ").removesuffix("!")}}}'


REFUSED = {
    "which": (
        row("<image><image>Where?", '"bbox_2d": [1, 2, 3, 4]', image=["wide.jpg", "tall.png"]),
        "conversations[1]",
        "box [1, 2, 3, 4] may be in any of image[0] (700x300), image[1] (120x400), and is not the same in each",
    ),
    "no picture": (row("Where?", '"bbox_2d": [1, 2, 3, 4]'), "conversations[1]", "no picture that it could be in"),
    "no box": (
        row("<image>", '"bbox_2d": [1, 2, 3]', image="wide.jpg"),
        "conversations[1]",
        "is not a box: [x1, y1, x2, y2] belongs there, since --box_format is pixels",
    ),
    "half a box": (
        row("<image>", "<|box_start|>(1,2),(3)<|box_end|>", image="wide.jpg"),
        "conversations[1]",
        "'<|box_start|>(1,2),(3)' is not a box: (x1,y1),(x2,y2) belongs there",
    ),
    "few boxes": (grounded([1, 2, 3, 4], bbox=[]), "objects.bbox", "0 in it, 1 <bbox> in the text"),
    "many names": (grounded([1, 2, 3, 4], ref=["a", "b"]), "objects.ref", "2 in it, 1 <ref-object> in the text"),
    "type": (grounded([1, 2, 3, 4], bbox_type="norm"), "objects.bbox_type", "is 'norm'. Write one of real, norm1"),
    "image": (grounded([1, 2, 3, 4], image_id=[1]), "objects.image_id[0]", "is 1, the row has 1 pictures"),
    "ids": (grounded([1, 2, 3, 4], image_id=[0, 0]), "objects.image_id", "2 in it, 1 boxes"),
    "three": (grounded([1, 2, 3]), "objects.bbox[0]", "is [1, 2, 3], where [x1, y1, x2, y2] or a point"),
    "words": (grounded(["1", 2, 3, 4]), "objects.bbox[0]", "where [x1, y1, x2, y2] or a point"),
    "infinite": (grounded([1, 2, 3, float("inf")]), "objects.bbox[0]", "where [x1, y1, x2, y2] or a point"),
    "forged": (grounded([1, 2, 3, 4], ref=["<|im_end|>"]), "objects.ref[0]", "holds <|im_end|>"),
    "list": (row("<image><bbox>", "a", image="wide.jpg", objects=[1]), "objects", "is a list, not an object"),
    "nowhere": (row("Hi", "<bbox>", objects={"bbox": [[1, 2, 3, 4]]}), "objects.bbox", "the row has no picture"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_rows_name_the_field(encoder, folder, what):
    raw, field, reason = REFUSED[what]
    encoder = replace(encoder, family=LATER, recipe=replace(encoder.recipe, box_format="pixels"))
    for step in (encoder.measure, encoder.encode):
        with pytest.raises(DataError) as refused:
            step(parse(raw, folder))
        assert refused.value.row.field == field
        assert reason in refused.value.row.reason


def test_objects_of_other_sets_are_no_concern(encoder, folder):
    """Without a placeholder in the text, the key is ignored as other unknown keys are."""
    plain = row("<image>What?", "A <|box_start|>", image="wide.jpg")
    for other in ([1], {"bbox": "x"}, {"bbox": [[1, 2, 3, 4]]}, "text"):
        sample = parse({**plain, "objects": other}, folder)
        assert sample.objects is None
        assert encoder.encode(sample).text == encoder.encode(parse(plain, folder)).text
    literal = row("<image>", "Write <bbox>.", image="wide.jpg")
    assert said(encoder, literal, folder) == "Write <bbox>."


@pytest.mark.parametrize("family", [FAMILY, LATER], ids=["tokens", "json"])
def test_measured_is_encoded(encoder, folder, family):
    encoder = replace(encoder, family=family, recipe=replace(encoder.recipe, box_format="0-1"))
    rows = [
        grounded([3, 4, 699, 299]),
        grounded([0.125, 0.5, 1, 1], images="turned.jpg", bbox_type="norm1"),
        row("<image>", "<|box_start|>(0.1,0.123456),(0.2,1)<|box_end|>", image="tall.png"),
    ]
    for raw in rows:
        cost, encoded = encoder.measure(parse(raw, folder)), encoder.encode(parse(raw, folder))
        assert cost.tokens == len(encoded.input_ids_T)
        assert cost.supervised == int((encoded.labels_T != -100).sum())
        prompt = encoder.prompt(replace(parse(raw, folder), turns=parse(raw, folder).turns[:1]))
        assert encoded.text.startswith(prompt.text)


def test_kept_costs_are_of_the_same_boxes(encoder, folder, tmp_path):
    """A row with another convention, or other numbers under `objects`, is another row."""
    text = row("<image>", "<|box_start|>(0.1,0.123456),(0.2,1)<|box_end|>", image="tall.png")
    long = grounded([0, 0, 1, 1])

    def costs(rows, box_format):
        path = write_json(tmp_path / "rows.json", rows)
        samples = index_rows([str(path)], image_folder=str(folder), family=FAMILY)
        one = replace(encoder, recipe=replace(encoder.recipe, box_format=box_format))
        kept = list(cost_cache.scan_costs(samples, one, workers=0, folder=tmp_path / "kept", note=print))
        assert kept == [one.measure(sample) for sample in samples]
        return kept

    assert costs([text, long], "as_is") != costs([text, long], "0-1")
    other = grounded([300, 100, 600, 250])
    assert costs([text, long], "0-1") != costs([text, other], "0-1")


def test_check_data_warns_of_odd_boxes(capsys, base, folder, tmp_path):
    data = write_json(
        tmp_path / "rows.json",
        [
            row("<image>Where?", "<|box_start|>(10,20),(1200,200)<|box_end|>", image="wide.jpg"),
            row("<image>Where?", "<|box_start|>(10,20),(600,200)<|box_end|>", image="wide.jpg"),
            grounded([90, 20, 60, 40], images="tall.png"),
            grounded([9, 20, 60, 40], images=["tall.png", "wide.jpg"]),
        ],
    )
    for model in (["--model_id", str(base)], []):
        argv = ["check-data", str(data), "--image_folder", str(folder), "--box_format", "pixels", "--json", *model]
        assert main(argv) == 0
        found = [(w["index"], w["field"], w["reason"]) for w in json.loads(capsys.readouterr().out)["warnings"]]
        assert [place[:2] for place in found] == [
            (0, "conversations[1]"),
            (2, "objects.bbox[0]"),
            (3, "objects.image_id"),
        ]
        assert "box 10,20,1200,200 (pixels) leaves the picture, which ends at 700,300" in found[0][2]
        assert "box 90,20,60,40 (pixels) is empty" in found[1][2]
        assert "all boxes are taken to be in the first" in found[2][2]
    assert main(["check-data", str(data), "--image_folder", str(folder), "--json"]) == 0
    assert [w["index"] for w in json.loads(capsys.readouterr().out)["warnings"]] == [2, 3]
    assert remarks(parse(grounded([9, 20, 60, 40]), folder), family=FAMILY, box_format="as_is") == ()


# ---- answers


def test_what_a_row_teaches_comes_back_in_pixels(encoder, folder):
    """`objects` -> the text a model is trained to write -> pixels of the original again."""
    settings = Recipe.of(encoder.processor)
    for family in (FAMILY, LATER, THIRD):
        raw = grounded([33.5, 100, 66, 321], images="turned.jpg")
        answer = said(replace(encoder, family=family), raw, folder)
        if family.box_style == "json":
            answer = answer.replace("Here: ", '{"label": "a cup", "bbox_2d": ') + "}"
        else:
            answer = answer.replace("Here: ", "<|object_ref_start|>a cup<|object_ref_end|>")
        asked = parse(raw, folder)
        asked = replace(asked, turns=asked.turns[:1])
        [box] = boxes_in_answer(
            answer, asked, lambda part: measure(part, settings), family=family, patch_size=settings.patch_size
        )
        assert (box.label, box.picture) == ("a cup", f"{folder}/turned.jpg")
        assert box.pixels == pytest.approx((33.5, 100, 66, 321), abs=1)


def test_whose_picture_is_open_is_told_without_pixels(folder):
    asked = parse(row("<image><image>Where?", "x", image=["wide.jpg", "tall.png"]), folder)
    answer = "<|box_start|>(1,2),(3,4)<|box_end|>, <|box_start|>nothing<|box_end|>"
    [box] = boxes_in_answer(answer, asked, lambda _: Grid(t=1, h=2, w=2), family=FAMILY, patch_size=14)
    assert (box.label, box.model, box.picture, box.pixels) == (None, (1, 2, 3, 4), None, None)


def test_chat_lists_boxes_in_pixels(base, folder, monkeypatch, capsys):
    answer = "<|object_ref_start|>it<|object_ref_end|><|box_start|>(500,100),(1000,900)<|box_end|>"
    monkeypatch.setattr("vlft.model.generate.Speaker.text", lambda self, ids: answer)
    chat: Chat = open_model(base)
    asked = [question("Where?", [("image", str(folder / "wide.jpg"))], family=chat.family)]
    assert chat.boxes("no box", asked) == ()
    argv = ["chat", str(base), "--image", str(folder / "wide.jpg"), "--max_new_tokens", "1", "Where?"]
    assert main([*argv, "--boxes"]) == 0
    assert capsys.readouterr().out.endswith(f"\nbox: it: 350,30,700,270 in pixels of {folder}/wide.jpg\n")
    assert main([*argv, "--json"]) == 0
    [box] = json.loads(capsys.readouterr().out)["boxes"]
    assert box == {
        "label": "it",
        "model": [500, 100, 1000, 900],
        "picture": f"{folder}/wide.jpg",
        "pixels": [350, 30, 700, 270],
    }
    assert main([*argv, "--json", "--boxes"]) == 2
    assert "--boxes has no effect with --json" in capsys.readouterr().err
