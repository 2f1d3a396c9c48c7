"""`python -m sentence_classifier MODEL.onnx`: see command_line.py."""

from sentence_classifier.command_line import main

if __name__ == "__main__":
    main()
