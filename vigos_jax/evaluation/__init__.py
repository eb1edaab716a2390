"""Benchmarks by the paper's protocol: questions, sampled answers, grading, statistics, reports."""
