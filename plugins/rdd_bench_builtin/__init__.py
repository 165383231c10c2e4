"""The plugins that come with rdd-bench. They import only ``rdd_bench.api``."""
