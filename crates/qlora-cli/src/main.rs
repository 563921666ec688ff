//! The qlora command
fn main() {}
