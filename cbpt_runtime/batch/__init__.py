"""Many images, labelled: `cbpt-runtime label`, on one machine or on a Ray cluster.

    engine        Daft, which schedules the workers and reads object stores (the extra ``batch``), and Ray
    sources       what is labelled: folders, globs, tables, tar shards; here or in an object store
    references    where one image is, and its bytes
    partitions    the images of a run, listed once, and the rows that are written of them, whole or absent
    workers       the classifier in the engine's workers
    summary       what came out, counted over the files
    labelling     all of it in order: `label_images`

Every image gets a row. One that cannot be read gets a row with its error. The rows of a partition are written
when all of them are there, in the order of the plan, so that a partition is the same file whoever worked on
it, and a run that was killed goes on with those that are missing.
"""
