"""The screens of `vlft ui`, one file each: `build(desk)` makes the fields, and pure functions say what is shown."""
