"""Model families: how a configuration becomes layers, which layer stands for which class, and what each stage runs."""
