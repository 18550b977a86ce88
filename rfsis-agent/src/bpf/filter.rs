//! A program as a filter on clsact, attached by netlink with a fixed priority and handle: it outlives
//! the agent, and the next agent's takes its place.

use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};

use super::error::os_error;

/// Before all other filters of the host: one that ends the classification in front of ours would let
/// packets past it.
const PRIORITY: u16 = 1;

/// "RF": one fixed place, so that a filter is replaced and never stacked.
const HANDLE: TcHandle = TcHandle::new(0x5246, 1);

/// Why a filter could not be attached.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilterError {
    #[error("{0}")]
    Program(#[from] ProgramError),
    #[error("{0}")]
    Tc(#[from] TcError),
}

/// How a filter came to its place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attached {
    /// The interface had no clsact qdisc before.
    pub added_clsact: bool,
    /// In place of the filter of an agent that died.
    pub replaced: bool,
}

/// Attaches a program, in place of the one that a dead agent left there if there is one: the kernel
/// swaps the program of the filter, so no packet finds the hook without it.
pub(super) fn attach(
    program: &mut SchedClassifier,
    interface: &str,
    hook: TcAttachType,
) -> Result<Attached, FilterError> {
    let added_clsact = match qdisc_add_clsact(interface) {
        Ok(()) => true,
        Err(error) if os_error(&error) == Some(libc::EEXIST) => false,
        Err(error) => return Err(error.into()),
    };
    let replaced = if added_clsact {
        create(program, interface, hook)?;
        false
    } else {
        replace(program, interface, hook)?
    };
    Ok(Attached {
        added_clsact,
        replaced,
    })
}

fn create(
    program: &mut SchedClassifier,
    interface: &str,
    hook: TcAttachType,
) -> Result<(), FilterError> {
    let options = TcAttachOptions::Netlink(NlOptions {
        priority: PRIORITY,
        handle: HANDLE,
        classid: None,
    });
    let id = program.attach_with_options(interface, hook, options)?;
    // Dropped, the link would take the filter with it.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// `true` where a filter was there and was replaced.
fn replace(
    program: &mut SchedClassifier,
    interface: &str,
    hook: TcAttachType,
) -> Result<bool, FilterError> {
    let place = SchedClassifierLink::attached(interface, hook, PRIORITY, HANDLE, None)
        .map_err(TcError::IoError)?;
    // RTM_NEWTFILTER without NLM_F_CREATE: `cls_bpf_change` swaps the program of the filter.
    match program.attach_to_link(place) {
        Ok(id) => {
            std::mem::forget(program.take_link(id)?);
            Ok(true)
        }
        Err(error) if os_error(&error) == Some(libc::ENOENT) => {
            create(program, interface, hook).map(|()| false)
        }
        Err(error) => Err(error.into()),
    }
}
