//! Raw frames: sent and heard on a host's eth0, with nothing of IP in between.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind,
    recvmsg, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeSpec, TimeVal};

use crate::netns::Namespace;

/// Longest frame that is heard, bytes: a super-frame of the longest IP packet has a few more than 64 KiB.
pub const SNAP: usize = 65_600;

/// Frames that wait to be heard, bytes of the kernel's memory: it takes no more than 1 GiB.
const QUEUE: usize = 1 << 30;

/// A frame that was heard.
#[derive(Debug)]
pub struct Heard<'buffer> {
    /// From its Ethernet header on.
    pub frame: &'buffer [u8],
    /// When it passed.
    pub at: SystemTime,
    /// How many this socket has lost before it, because its queue was full.
    pub lost: u32,
}

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
            bind(socket.as_raw_fd(), &eth0).context("binding to eth0")?;
            // The kernel doubles it.
            setsockopt(&socket, sockopt::RcvBufForce, &(QUEUE / 2 - 1))?;
            setsockopt(&socket, sockopt::RxqOvfl, &1)?;
            setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
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
            let heard = self.next(&mut buffer)?;
            if let Some(found) = heard.and_then(|heard| pick(heard.frame)) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The next frame, or `None` if there is none for a while.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn next<'buffer>(&self, buffer: &'buffer mut [u8]) -> Result<Option<Heard<'buffer>>> {
        let mut control = nix::cmsg_space!(TimeSpec, u32);
        let mut parts = [IoSliceMut::new(buffer)];
        let message = recvmsg::<()>(
            self.socket.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::empty(),
        );
        let message = match message {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(error) => return Err(error).context("hearing frames"),
        };
        let (mut at, mut lost) = (UNIX_EPOCH, 0);
        for note in message.cmsgs().context("what the kernel says of a frame")? {
            match note {
                ControlMessageOwned::ScmTimestampns(time) => at += Duration::from(time),
                ControlMessageOwned::RxqOvfl(count) => lost = count,
                _ => {}
            }
        }
        let length = message.bytes;
        Ok(Some(Heard {
            frame: &buffer[..length],
            at,
            lost,
        }))
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
