//! The workspace's own tasks: ci, tidy, test, bench, golden
fn main() {}
