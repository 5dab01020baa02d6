"""Labels that a teacher makes: drawn, scored, filtered, written as rounds."""
