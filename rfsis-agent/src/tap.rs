//! How the VIP's frames reach the standby: the interface and the programs that the configured tap takes.

use rfsis_common::mirror::MirrorEgress;

use crate::bpf::{BpfError, MirrorParams, Programs};
use crate::cli::Fatal;
use crate::config::{Config, Protect, Tap};
use crate::engine::FrameSource;
use crate::netif::Netif;

/// The interface that sends and takes copies of the VIP's frames: the VIP's own, `netif`, unless
/// configured.
///
/// # Errors
/// A `sync_interface` that is missing, not Ethernet, or of a smaller MTU than the VIP's.
pub async fn interface(config: &Config, netif: &Netif) -> Result<Netif, Fatal> {
    let Tap::Mirror(mirror) = &config.tap else {
        return Ok(netif.clone());
    };
    if mirror.egress != MirrorEgress::Full && config.protect == Protect::Async {
        tracing::warn!(
            mirror_egress = mirror.egress.as_str(),
            "the standby does not see what the active acknowledges: a lost copy stays unnoticed"
        );
    }
    let Some(name) = &mirror.sync_interface else {
        return Ok(netif.clone());
    };
    let tap = Netif::new(name).await?;
    if tap.mtu < netif.mtu {
        return Err(Fatal::Unfit(anyhow::anyhow!(
            "sync_interface {name}: found MTU {}, expected {} or more, as {} has: copies are not cut; \
             `ip link set dev {name} mtu {}`",
            tap.mtu,
            netif.mtu,
            netif.name,
            netif.mtu,
        )));
    }
    Ok(tap)
}

/// What the programs are told of the mirror.
pub fn mirror_params(config: &Config, tap: &Netif) -> Option<MirrorParams> {
    match &config.tap {
        Tap::Lan => None,
        Tap::Mirror(mirror) => Some(MirrorParams {
            ifindex: tap.index,
            mac: tap.mac,
            egress: mirror.egress,
        }),
    }
}

/// Where the standby's frames come from.
pub fn frame_source(config: &Config, tap: &Netif) -> FrameSource {
    match config.tap {
        Tap::Lan => FrameSource::Lan,
        Tap::Mirror(_) => FrameSource::Mirror(tap.index),
    }
}

/// Attaches what the tap takes besides the gate and what catches frames on the VIP's interface. A sync
/// interface gets both, too: a host answers for its addresses on every link.
///
/// # Errors
/// As [`Programs::attach_gate`] and [`Programs::attach_ingress`].
pub fn attach(config: &Config, tap: &Netif, programs: &mut Programs) -> Result<(), BpfError> {
    let Tap::Mirror(mirror) = &config.tap else {
        return match config.protect {
            // It tells the ACK gate's guard of new connections.
            Protect::Sync(_) => programs.attach_mirror(&config.interface),
            // Of an agent that died with another config.
            Protect::Async => programs.remove_mirror(&config.interface),
        };
    };
    programs.attach_mirror(&config.interface)?;
    if let Some(name) = &mirror.sync_interface {
        programs.attach_gate(name)?;
        programs.attach_ingress(name, config.xdp.unwrap_or(tap.xdp_mode))?;
    }
    Ok(())
}
