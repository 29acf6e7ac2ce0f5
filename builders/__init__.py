"""The builder: from a labelled image dataset and a teacher to distilled shards, one module a stage."""
