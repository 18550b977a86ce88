//! Stub: the role alone.

/// What the operator prefers this node to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Becomes active when both nodes are free to.
    Primary,
    /// Becomes active when the primary is not there.
    Backup,
}

impl Role {
    /// The word used on the command line and in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Primary => "primary",
            Role::Backup => "backup",
        }
    }
}
