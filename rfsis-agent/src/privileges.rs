//! What the process may do: what its start takes, and less as soon as it runs.
//!
//! Capabilities belong to threads and pass to the threads that these start (capabilities(7)). So:
//!
//! - before there is a second thread, [`at_start`] gives up all that neither start nor run need, and for good:
//!   out of the bounding set, no new privileges by execve(2);
//! - only the first thread and the two named ones, until they have set themselves up, hold what the start takes;
//! - all others, and these from then on, hold [`NEEDED`] and [`HELD`]: [`while_running`].

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;

use crate::cli::Fatal;
use crate::netif::listed;

/// Held as long as the agent runs, and needed: maps, programs and their links; addresses, filters, neighbours,
/// sockets of the VIP (SOCK_DESTROY, TCP_REPAIR, SO_MARK, SO_*FORCE); raw and packet sockets.
const NEEDED: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_RAW,
];

/// Held as long as the agent runs where they are there: service ports below 1024, which sockets of adopted
/// connections are bound to; and locked memory, without which every allocation past RLIMIT_MEMLOCK would fail.
const HELD: [Capability; 2] = [Capability::CAP_NET_BIND_SERVICE, Capability::CAP_IPC_LOCK];

/// Without it the verifier refuses the programs: arithmetic on a pointer into a ring buffer, where a log record
/// is written, is "prohibited for !root" (kernel/bpf/verifier.c). Nothing is loaded later.
const LOADING: Capability = Capability::CAP_PERFMON;

/// Used by the start where they are there: a real-time heartbeat thread. What lacks without it is said where it
/// is tried. A control socket whose directory is another user's takes the last.
const STARTING: [Capability; 2] = [Capability::CAP_SYS_NICE, Capability::CAP_DAC_OVERRIDE];

/// Why the process does not get to the privileges that it should have.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// Without these there is no agent.
    #[error(
        "no permission: the agent lacks {}; run as root, or grant it (AmbientCapabilities= of the systemd unit)",
        listed(.0)
    )]
    Missing(Vec<Capability>),
    /// The kernel does not let go.
    #[error("cannot give up capabilities: {0}")]
    Capabilities(#[from] CapsError),
    /// The kernel does not let go.
    #[error("cannot give up new privileges (PR_SET_NO_NEW_PRIVS): {0}")]
    NewPrivileges(#[from] Errno),
}

impl From<PrivilegeError> for Fatal {
    fn from(error: PrivilegeError) -> Self {
        match error {
            PrivilegeError::Missing(_) => Fatal::Unable(error.into()),
            _ => Fatal::Failed(error.into()),
        }
    }
}

/// Gives up what neither start nor run need. To be called before there is a second thread.
///
/// Who lacks CAP_SETPCAP keeps its bounding set, and cannot make use of it: nothing that it could execute has
/// more privileges.
///
/// # Errors
/// [`PrivilegeError::Missing`] names what lacks; the others do not happen on a kernel that RFSIS runs on.
pub fn at_start() -> Result<(), PrivilegeError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let missing: Vec<Capability> = NEEDED
        .into_iter()
        .chain([LOADING])
        .filter(|capability| !permitted.contains(capability))
        .collect();
    if !missing.is_empty() {
        return Err(PrivilegeError::Missing(missing));
    }
    nix::sys::prctl::set_no_new_privs()?;
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::runtime::thread_all_supported() {
            if !runs_with(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    keep(|capability| {
        runs_with(capability) || STARTING.contains(capability) || *capability == LOADING
    })
}

/// Gives up what the calling thread needed for the start.
///
/// # Errors
/// The kernel's; it allows everybody to have less.
pub fn while_running() -> Result<(), PrivilegeError> {
    keep(runs_with)
}

/// [`while_running`] for a thread that nobody waits for: rather no agent than one that may do too much.
pub fn while_running_or_abort() {
    if let Err(error) = while_running() {
        tracing::error!(%error, "a thread keeps privileges that it should not have");
        std::process::abort();
    }
}

fn runs_with(capability: &Capability) -> bool {
    NEEDED.contains(capability) || HELD.contains(capability)
}

fn keep(wanted: impl Fn(&Capability) -> bool) -> Result<(), PrivilegeError> {
    let mut kept = caps::read(None, CapSet::Permitted)?;
    kept.retain(wanted);
    // What is not inheritable is not ambient either.
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    // In this order: what is effective must be permitted.
    let effective = caps::read(None, CapSet::Effective)?;
    let both = kept.intersection(&effective).copied().collect();
    caps::set(None, CapSet::Effective, &both)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    caps::set(None, CapSet::Effective, &kept)?;
    Ok(())
}
