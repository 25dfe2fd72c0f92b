"""The page: the screens in steps, one timer that keeps them up to date, and the form in the browser's storage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vlft.ui.desk import KEPT, Action, Choices, Desk, state_of
from vlft.ui.screens import check, compare, data, look, merge, plan, train

EVERY = 2.0  # seconds between two looks at jobs and runs
SCREENS = (
    ("1 Data", data), ("2 Check", check), ("3 Look", look), ("4 Plan", plan), ("5 Train", train),
    (compare.STEP, compare), ("7 Merge", merge),
)  # fmt: skip
#: Fields that no browser keeps: files that were uploaded.
PASSING = ("picture",)
#: Fields that are set by themselves.
IN_BROWSER = (*PASSING, "step")


def build(desk: Desk) -> Any:
    """Return the page as `gradio.Blocks`."""
    import gradio as gr

    with gr.Blocks(title="vlft ui", analytics_enabled=False, fill_width=False, delete_cache=(3600, 86400)) as blocks:
        titles = [title for title, _ in SCREENS]
        # Not tabs: a phone shows all steps, and the browser keeps which one is open. `ui.css` shows the chosen one.
        step = desk.add(step=gr.Radio(titles, value=titles[0], show_label=False, container=False, elem_id="steps"))
        for place, (_, screen) in enumerate(SCREENS, start=1):
            with gr.Column(elem_id=f"screen-{place}", elem_classes="screen"):
                screen.build(desk)
                if place < len(SCREENS):
                    on = gr.Button(f"Next: {titles[place]}", elem_classes="next")
                    on.click(None, None, step, js=f"() => {{ scrollTo(0, 0); return {titles[place]!r} }}")
        _wire(blocks, desk, gr.State([]), gr)
    return blocks


def _wire(blocks: Any, desk: Desk, seen: Any, gr: Any) -> None:
    fields = [*desk.fields.values()]
    panels = [output for panel in desk.panels for output in panel.outputs]
    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    messages = {id(action.message): action.message for action in desk.actions}

    def refreshed(values: Sequence[Any], before: list[Any]) -> list[Any]:
        now = desk.view(desk.form(values))
        same = len(before) == len(now)
        changed = [gr.skip() if same and before[i] == one else _update(one, gr) for i, one in enumerate(now)]
        return [*changed, now]

    def on_tick(*values: Any) -> list[Any]:
        after = refreshed(values[:-1], values[-1])
        old, new = (dict(zip(map(id, panels), one, strict=False)) for one in (values[-1], after[-1]))
        over = {
            id(action.message)
            for action in desk.actions
            if id(action.about) in old and state_of(old[id(action.about)]) != state_of(new[id(action.about)])
        }
        return [*after, *("" if place in over else gr.skip() for place in messages)]

    def on_change(*values: Any) -> list[Any]:
        return refreshed(values[:-1], values[-1])

    def on_load(*values: Any) -> list[Any]:
        return refreshed(values[:-1], [])

    def doing(action: Action) -> Any:
        def on_click(*values: Any) -> list[Any]:
            text, new = desk.act(action, desk.form(values[:-1]))
            after = [new.get(name, value) for name, value in zip(desk.fields, values[:-1], strict=True)]
            # Only what differs: the user may have gone on typing meanwhile.
            was = dict(zip(desk.fields, values[:-1], strict=True))
            sets = [new[name] if name in new and new[name] != was[name] else gr.skip() for name in action.sets]
            return [text, *sets, *refreshed(after, values[-1])]

        return on_click

    for action in desk.actions:
        outputs = [action.message, *(desk.fields[name] for name in action.sets)]
        # A component may be set by the action and get new choices from a panel: Gradio takes the updates in order.
        action.button.click(doing(action), [*fields, seen], [*outputs, *panels, seen], **quiet)
    gr.on(
        [one.change for one in fields],
        on_change,
        [*fields, seen],
        [*panels, seen],
        trigger_mode="always_last",
        **quiet,
    )
    inner = desk.panels[0].outputs[0]
    inner.input(data.moved, [desk.fields["folder"], inner], [desk.fields["folder"], inner], **quiet)
    # The browser keeps the form, one for each tab: `ui.js` says where.
    names = json.dumps([name if name not in PASSING else "" for name in desk.fields])
    gr.on([one.change for one in fields], None, fields, None, js=f"(...values) => vlftForm.keep({names}, values)")
    # The form is set in the browser: an answer of the server may come after the user has changed it.
    step = desk.fields["step"]
    step.change(None, step, None, js="title => vlftForm.show(title)")
    blocks.load(None, step, step, js=f"now => vlftForm.step(now, {json.dumps([title for title, _ in SCREENS])})")
    stored = {name: one for name, one in desk.fields.items() if name not in IN_BROWSER}
    kept = "(...values) => vlftForm.kept({}, values)".format
    filled = blocks.load(None, [*stored.values()], [*stored.values()], js=kept(json.dumps([*stored])))
    filled.then(None, None, None, js="() => vlftForm.loaded()")
    blocks.load(on_load, [*fields, seen], [*panels, seen], js=kept(names), **quiet)
    gr.Timer(EVERY).tick(on_tick, [*fields, seen], [*panels, seen, *messages.values()], **quiet)


def _update(value: Any, gr: Any) -> Any:
    if value is KEPT:
        return gr.skip()
    return gr.update(choices=list(value.choices)) if isinstance(value, Choices) else value
