//! Raw frames: sent and heard on a host's eth0, with nothing of IP in between.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::netns::Namespace;

/// Longest frame that is heard; longer ones are cut.
const SNAP: usize = 65536;

/// An AF_PACKET socket on a host's eth0. It hears everything there, frames for others included:
/// on a flooding bridge that is the whole LAN.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
    eth0: LinkAddr,
}

impl Wire {
    /// Opens the wire of a host. What comes from now on is heard, in order.
    ///
    /// # Errors
    /// When the host has no eth0 or the process may not open raw sockets.
    pub fn open(host: &Namespace) -> Result<Self> {
        host.run(|| {
            let eth0 = getifaddrs()?
                .filter(|interface| interface.interface_name == "eth0")
                .find_map(|interface| interface.address?.as_link_addr().copied())
                .context("no eth0 in this namespace")?;
            let socket = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )
            .context("a raw socket: run as root")?;
            setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20))?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))?;
            Ok(Self { socket, eth0 })
        })
    }

    /// Sends one frame, from its Ethernet header on, without checksum or padding added.
    ///
    /// # Errors
    /// What `sendto` says: the link is down, the frame above the MTU.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        sendto(
            self.socket.as_raw_fd(),
            frame,
            &self.eth0,
            MsgFlags::empty(),
        )
        .with_context(|| format!("sending a frame of {} bytes", frame.len()))?;
        Ok(())
    }

    /// The next frame that `pick` turns into something, or `None` when `limit` has passed.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn hear<T>(
        &self,
        limit: Duration,
        mut pick: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Option<T>> {
        let deadline = Instant::now() + limit;
        let mut buffer = vec![0; SNAP];
        while Instant::now() < deadline {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let length =
                match recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, None, MsgFlags::empty()) {
                    Ok(message) => message.bytes,
                    Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => continue,
                    Err(error) => return Err(error).context("hearing frames"),
                };
            if let Some(found) = pick(&buffer[..length]) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patience::{PATIENCE, slowed};
    use crate::{Host, Lab};

    #[test]
    fn the_bridge_floods_frames_between_two_hosts_to_the_third() {
        let lab = Lab::new();
        let sender = Wire::open(lab.host(Host::A)).unwrap();
        let bystander = Wire::open(lab.host(Host::Client)).unwrap();
        let mut frame = Vec::new();
        frame.extend(Host::B.mac());
        frame.extend(Host::A.mac());
        frame.extend([0x88, 0xb5]);
        frame.extend(*b"not for the client");
        // Twice: a bridge that learned would keep the second to itself.
        let from_b = Wire::open(lab.host(Host::B)).unwrap();
        let mut answer = frame.clone();
        answer[..6].copy_from_slice(&Host::A.mac());
        answer[6..12].copy_from_slice(&Host::B.mac());
        from_b.send(&answer).unwrap();
        sender.send(&frame).unwrap();
        let heard = bystander
            .hear(slowed(PATIENCE), |heard| (heard == frame).then_some(()))
            .unwrap();
        assert_eq!(heard, Some(()));
    }
}
