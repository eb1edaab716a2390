"""Whether an answer is right: rules, algebra, a judge. Every verdict names its grader."""
