//! The `livemig` command.

fn main() {}
