"""A page in the browser to work in: choose data, check it, look at rows, plan, train, compare, merge. No code.

    page        Gradio: the screens in their order, one timer            server      token, pages of jobs, then Gradio
    screens/    one file a screen: its fields, and a pure function       guard       who may send a request
                from form to what is shown                               later       requests wait while Gradio loads
    desk        what screens share                                      assets      Gradio's scripts, as files
    commands    form -> command line       jobs, keep   processes        runs        run folders, whoever started them
    words       flag -> name of its field                 more        the field for further flags
    folders     names in a folder          rows         one row to ask   thumbs      small pictures
    small       regular files only, of limited size

Everything the page does is a command of vlft in a process of its own, so this room imports no torch. Gradio is imported
beside the server, while a browser opens the address.
"""
