//! Whether the VIP's interface has carrier, as the kernel tells it (rtnetlink).
//!
//! The heartbeat thread reads this itself, before it looks at the heartbeats: whatever it slept through, it knows of
//! a cut before it takes the silence of its peer for its death.
//!
//! The kernel tells at once, but for a loss within a second of an event before it, on a NIC: that it may keep back
//! for the rest of the second (`linkwatch_schedule_work` in net/core/link_watch.c).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rtnetlink::packet_core::{
    NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkFlags, LinkHeader, LinkMessage};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Types of messages, and a group of those who hear them (`include/uapi/linux/rtnetlink.h`).
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTMGRP_LINK: u32 = 1;

/// More than the kernel says of one interface.
const MESSAGE: usize = 64 << 10;

/// Hears of every change of an interface from its making on, and first of what it is then.
#[derive(Debug)]
pub struct CarrierWatch {
    socket: Socket,
    index: u32,
    message: Vec<u8>,
}

impl CarrierWatch {
    /// Of the interface `index`.
    ///
    /// # Errors
    /// Of the calls to the kernel.
    pub fn open(index: u32) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, RTMGRP_LINK))?;
        socket.set_non_blocking(true)?;
        let message = Vec::with_capacity(MESSAGE);
        let watch = Self {
            socket,
            index,
            message,
        };
        watch.ask()?;
        Ok(watch)
    }

    /// The answer is read like a change.
    fn ask(&self) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = self.index;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST;
        let payload = NetlinkPayload::from(RouteNetlinkMessage::GetLink(link));
        let mut message = NetlinkMessage::new(header, payload);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// The next that the kernel told; `None` when it has told nothing more.
    pub fn read(&mut self) -> Option<bool> {
        loop {
            self.message.clear();
            match self.socket.recv_from(&mut self.message, 0) {
                // From the kernel.
                Ok((_, from)) if from.port_number() == 0 => {
                    if let Some(carrier) = carrier_of(self.index, &self.message) {
                        return Some(carrier);
                    }
                }
                Ok(_) => {}
                // So much changed that messages were lost.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.ask().ok()?,
                Err(_) => return None,
            }
        }
    }
}

impl AsFd for CarrierWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What a message says of the interface, if it is about it. Its attributes, of which the kernel invents new ones, are
/// not looked at.
fn carrier_of(index: u32, message: &[u8]) -> Option<bool> {
    let message = NetlinkBuffer::new_checked(message).ok()?;
    let link = LinkHeader::parse(message.payload()).ok()?;
    if link.index != index {
        return None;
    }
    match message.message_type() {
        // `IFF_LOWER_UP`: up, and with carrier (`dev_get_flags` in net/core/dev.c).
        RTM_NEWLINK => Some(link.flags.contains(LinkFlags::LowerUp)),
        RTM_DELLINK => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, index: u32, flags: LinkFlags) -> Vec<u8> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = flags;
        let payload = NetlinkPayload::from(match kind {
            RTM_DELLINK => RouteNetlinkMessage::DelLink(link),
            RTM_NEWLINK => RouteNetlinkMessage::NewLink(link),
            _ => RouteNetlinkMessage::SetLink(link),
        });
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), payload);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    #[test]
    fn what_the_kernel_says_of_the_interface_and_of_no_other_is_its_carrier() {
        let up = LinkFlags::Up | LinkFlags::LowerUp;
        assert_eq!(carrier_of(7, &message(RTM_NEWLINK, 7, up)), Some(true));
        let cut = message(RTM_NEWLINK, 7, LinkFlags::Up);
        assert_eq!(carrier_of(7, &cut), Some(false));
        assert_eq!(carrier_of(7, &message(RTM_DELLINK, 7, up)), Some(false));
        assert_eq!(carrier_of(7, &message(RTM_NEWLINK, 8, up)), None);
        assert_eq!(carrier_of(7, &message(19, 7, up)), None);
        for length in 0..32 {
            assert_eq!(carrier_of(7, &cut[..length]), None);
        }
    }

    #[test]
    fn the_first_that_is_told_is_what_is() {
        let loopback = nix::net::if_::if_nametoindex("lo").expect("an interface");
        let mut watch = CarrierWatch::open(loopback).expect("a netlink socket");
        assert!(watch.read().is_some());
        assert_eq!(watch.read(), None);
    }
}
