//! `rfsis-agent`: see the crate's library.

fn main() {}
