"""Many images into a folder: the arguments that commands share, the folder, and the page that shows it."""
