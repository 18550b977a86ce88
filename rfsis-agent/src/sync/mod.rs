//! placeholder
pub mod record;
pub use record::*;
