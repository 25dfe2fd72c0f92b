"""Cache of the features that a frozen vision tower computes. Later epochs need neither the tower nor the pixels.

    keys    a picture or video and its settings -> a key
    stored  key -> features, from files that several processes and runs share
    writer  adds features to these files, within the bound of their folder
    reader  decodes a medium, or takes its features from these files; called in the loader's workers

Nothing here depends on a model. `vlft.model.prints` names the weights whose features are in a folder,
`vlft.train.features` adds what a run computes, and `vlft.setup.features` computes its size.
"""
