"""Watch a small YOLO learn from a bigger one: drawn data, a teacher, a student with FGD and one without."""
