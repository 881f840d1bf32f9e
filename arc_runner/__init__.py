"""The main job's parts: from the command line to prompts, generation, answers and the report."""
