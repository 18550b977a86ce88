//! Takes off an interface what an agent put there, without having loaded anything.

use aya::programs::TcAttachType;
use aya::programs::tc::{TcError, qdisc_detach_program};
use futures_util::TryStreamExt as _;
use rfsis_common::maps::names;
use rtnetlink::Handle;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle};

use super::error::{BpfError, os_error};

/// `XDP_FLAGS_SKB_MODE` and `XDP_FLAGS_DRV_MODE`, `include/uapi/linux/if_link.h`.
const GENERIC: u32 = 1 << 1;
const NATIVE: u32 = 1 << 2;

/// Detaches what is left of an agent that did not stop cleanly: its XDP program and its filters, and
/// the clsact qdisc if nothing else hangs on it. Remove the VIP first: until then only the gate is silent.
///
/// # Errors
/// No such interface, no privilege, or an agent that still runs and holds the XDP program.
pub async fn cleanup(interface: &str) -> Result<(), BpfError> {
    let Ok(index) = nix::net::if_::if_nametoindex(interface) else {
        return Err(super::interface_missing(interface));
    };
    // First, for it fails where an agent runs: the gate of that one stays.
    remove_xdp(interface, index).await?;
    remove_filters(interface, true).await
}

/// Opens a netlink socket in the namespace of the calling thread.
fn connect() -> Result<Handle, BpfError> {
    let (connection, handle, _) = rtnetlink::new_connection()
        .map_err(|error| BpfError::new("opening a netlink socket", &error))?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Detaches all filters by their names; the clsact qdisc too where `with_clsact`, a gate was there,
/// and nothing else hangs on it.
pub(super) async fn remove_filters(interface: &str, with_clsact: bool) -> Result<(), BpfError> {
    let Ok(index) = nix::net::if_::if_nametoindex(interface) else {
        // The filters went with the interface.
        return Ok(());
    };
    remove_ingress(interface)?;
    let had_gate = remove_filter(interface, TcAttachType::Egress, names::GATE)?;
    if had_gate && with_clsact {
        remove_empty_clsact(interface, index).await?;
    }
    Ok(())
}

/// Detaches what is there on ingress.
pub(super) fn remove_ingress(interface: &str) -> Result<(), BpfError> {
    for name in [names::INGRESS, names::MIRROR_PROGRAM] {
        remove_filter(interface, TcAttachType::Ingress, name)?;
    }
    Ok(())
}

/// Detaches a filter by the name of its program; `false` where there was none.
fn remove_filter(interface: &str, hook: TcAttachType, name: &str) -> Result<bool, BpfError> {
    match qdisc_detach_program(interface, hook, name) {
        Ok(()) => Ok(true),
        Err(TcError::IoError(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => {
            let operation = format!("detaching {name} from {interface}");
            Err(BpfError::new(operation, &error))
        }
    }
}

async fn remove_empty_clsact(interface: &str, index: u32) -> Result<(), BpfError> {
    let failed = |error: rtnetlink::Error| {
        BpfError::new(format!("removing the clsact qdisc of {interface}"), &error)
    };
    let handle = connect()?;
    // Interface indexes are positive `int`s in the kernel.
    let index = index.cast_signed();
    let filters = handle.traffic_filter(index);
    for request in [
        filters.clone().get().ingress(),
        filters.clone().get().egress(),
    ] {
        let mut messages = Box::pin(request.execute());
        if messages.try_next().await.map_err(failed)?.is_some() {
            return Ok(());
        }
    }
    let mut request = handle.qdisc().del(index);
    let message = request.message_mut();
    message.header.handle = TcHandle {
        major: 0xffff,
        minor: 0,
    };
    // TC_H_CLSACT, `include/uapi/linux/pkt_sched.h`.
    message.header.parent = TcHandle {
        major: 0xffff,
        minor: 0xfff1,
    };
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    match request.execute().await {
        Err(error) if matches!(os_error(&error), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result.map_err(failed),
    }
}

/// Detaches an XDP program by netlink if it has our name. One that is held by a link belongs to an agent
/// that runs, and the kernel refuses.
async fn remove_xdp(interface: &str, index: u32) -> Result<(), BpfError> {
    let failed = |error: rtnetlink::Error| match os_error(&error) {
        Some(libc::EBUSY) => BpfError::XdpBusy {
            interface: interface.to_owned(),
            detail: "held by a running process".to_owned(),
        },
        _ => BpfError::new(format!("detaching XDP from {interface}"), &error),
    };
    let handle = connect()?;
    let mut links = Box::pin(handle.link().get().match_index(index).execute());
    let Some(link) = links.try_next().await.map_err(failed)? else {
        return Ok(());
    };
    for (mode, program) in attached_xdp(&link) {
        if !is_ours(program) {
            continue;
        }
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::Xdp(vec![
            LinkXdp::Fd(-1),
            LinkXdp::Flags(mode),
        ]));
        handle
            .link()
            .change(message)
            .execute()
            .await
            .map_err(failed)?;
    }
    Ok(())
}

/// Modes and ids of the XDP programs on a link.
fn attached_xdp(link: &LinkMessage) -> Vec<(u32, u32)> {
    let attributes = link.attributes.iter();
    attributes
        .filter_map(|attribute| match attribute {
            LinkAttribute::Xdp(xdp) => Some(xdp),
            _ => None,
        })
        .flatten()
        .filter_map(|xdp| match xdp {
            LinkXdp::SkbProgId(id) => Some((GENERIC, *id)),
            LinkXdp::DrvProgId(id) => Some((NATIVE, *id)),
            _ => None,
        })
        .collect()
}

fn is_ours(program: u32) -> bool {
    aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .any(|info| info.id() == program && info.name_as_str() == Some(names::XDP))
}
