"""The builder: from a labelled image dataset and a teacher to distilled shards, one module a stage."""

from builders.interrupts import end_without_traceback

end_without_traceback()
