//! Reads the state of a running TCP socket without disturbing it, and makes a socket from such numbers
//! (TCP_REPAIR: tcp(7), `do_tcp_setsockopt` in net/ipv4/tcp.c).
//!
//! A socket in repair mode goes on receiving and acknowledging. Only what is written meanwhile is not sent,
//! and nothing is: the caller owns both directions. While the queue to *send* is selected the kernel would
//! also take as sent what an arriving acknowledgement allows it to send, so that is done last and for one
//! copy only; what falls into it is as if lost, and repeated.
//!
//! Needs CAP_NET_ADMIN.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use crate::adopt::Numbers;
use crate::lockstep::later;
use crate::segment::Options;
use crate::services::{RECEIVE_BUFFER, bound_buffers};
use crate::sys;

/// Queues, as TCP_REPAIR_QUEUE counts them (linux/tcp.h).
const RECEIVE_QUEUE: u32 = 1;
const SEND_QUEUE: u32 = 2;
/// Leave repair mode, and send no window probe.
const REPAIR_OFF: u32 = -1_i32 as u32;
const REPAIR_ON: u32 = 1;

/// Option kinds for `TCP_REPAIR_OPTIONS` (RFC 9293 section 3.1, RFC 7323, RFC 2018).
const KIND_MSS: u32 = 2;
const KIND_WINDOW: u32 = 3;
const KIND_SACK: u32 = 4;
const KIND_TIMESTAMP: u32 = 8;

/// The kernel takes a segment size from here on (`TCP_MIN_MSS`, net/ipv4/tcp.c) up to its largest window.
const MSS_RANGE: (u32, u32) = (88, 32_767);

/// States in which both queues may still move (net/tcp_states.h).
const ESTABLISHED: u8 = 1;
const CLOSE_WAIT: u8 = 8;

/// Bits of `tcpi_options` (linux/tcp.h).
const TIMESTAMPS: u8 = 1;
const SACK: u8 = 2;
const WINDOW_SCALE: u8 = 4;

/// What a socket promises its client before anything has come in, bytes, if it has to promise no more: as one that was
/// accepted.
const FIRST_WINDOW: u32 = u16::MAX as u32;

/// What most queues have room in, and what all have, bytes: buffers of the services' sockets are bounded.
const FEW: usize = 4 * 1024;
const ALL: usize = 1280 * 1024;

/// The client may send while its queue is read: then it is read again, up to so many times.
const ATTEMPTS: usize = 8;

/// One instant of a connection. Sequence numbers are those on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Behind the last that was received in order, a FIN included.
    pub received: u32,
    /// The peer has closed its side.
    pub fin: bool,
    /// Received and not read, ends before `received` and the FIN.
    pub unread: Vec<u8>,
    /// Behind the last byte that was written.
    pub written: u32,
    /// Written and not acknowledged, ends before `written`.
    pub unacknowledged: Vec<u8>,
    /// Right edge of the window that was offered to the peer.
    pub edge: u32,
    /// The peer takes so many bytes behind what it has acknowledged.
    pub window: u32,
    /// What the peer agreed to; its timestamp is not known: 0.
    pub peer: Options,
    /// What this side agreed to, and its timestamp now.
    pub own: Options,
}

/// Repair mode, until it is dropped.
struct Repair<'fd>(BorrowedFd<'fd>);

impl<'fd> Repair<'fd> {
    fn enter(socket: BorrowedFd<'fd>) -> io::Result<Self> {
        sys::set_tcp_option(socket, libc::TCP_REPAIR, &[REPAIR_ON])?;
        Ok(Self(socket))
    }

    fn select(&self, queue: u32) -> io::Result<()> {
        sys::set_tcp_option(self.0, libc::TCP_REPAIR_QUEUE, &[queue])
    }

    fn sequence(&self) -> io::Result<u32> {
        sys::tcp_option(self.0, libc::TCP_QUEUE_SEQ)
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        if let Err(error) = leave(self.0) {
            tracing::warn!(%error, "a socket does not leave repair mode");
        }
    }
}

/// Leaving clears SO_REUSEADDR too, without which a restarted agent could not listen beside what is left of
/// this connection.
fn leave(socket: BorrowedFd<'_>) -> io::Result<()> {
    sys::set_tcp_option(socket, libc::TCP_REPAIR, &[REPAIR_OFF])?;
    Ok(setsockopt(&socket, sockopt::ReuseAddr, &true)?)
}

/// Makes a connected socket, non-blocking, from numbers. Sends nothing, and if it fails leaves nothing behind.
///
/// # Errors
/// The system's: EPERM without CAP_NET_ADMIN, EADDRNOTAVAIL if the kernel has such a connection already.
pub fn restore(numbers: &Numbers) -> io::Result<TcpStream> {
    let Numbers { flow, vip, .. } = *numbers;
    let service = SocketAddrV4::new(vip, flow.service_port);
    let client = SocketAddrV4::new(Ipv4Addr::from(flow.client_addr), flow.client_port);
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    bound_buffers(&socket)?;
    socket.set_tcp_nodelay(true)?;
    // Else the segment size stays what it is before a handshake: `tcp_connect_init` sets it, from this, and
    // TCP_REPAIR_OPTIONS only what it may become.
    let mss = u32::from(numbers.mss).clamp(MSS_RANGE.0, MSS_RANGE.1);
    socket.set_tcp_mss(mss)?;
    let set = |option, words: &[u32]| sys::set_tcp_option(socket.as_fd(), option, words);
    // From here on closing the socket says nothing to anybody.
    set(libc::TCP_REPAIR, &[REPAIR_ON])?;
    set(libc::TCP_REPAIR_QUEUE, &[SEND_QUEUE])?;
    set(libc::TCP_QUEUE_SEQ, &[numbers.snd_nxt])?;
    set(libc::TCP_REPAIR_QUEUE, &[RECEIVE_QUEUE])?;
    set(libc::TCP_QUEUE_SEQ, &[numbers.rcv_nxt])?;
    // Else it would promise at once all that its buffer can take at best.
    set(libc::TCP_WINDOW_CLAMP, &[FIRST_WINDOW])?;
    // Repair binds beside the listener; SO_REUSEADDR would end that.
    socket.bind(&service.into())?;
    socket.connect(&client.into())?;
    set(libc::TCP_WINDOW_CLAMP, &[RECEIVE_BUFFER as u32])?;
    let (client_shift, own_shift) = numbers.shifts.unwrap_or((0, 0));
    let shifts = u32::from(client_shift) | u32::from(own_shift) << 16;
    let mut options = vec![KIND_MSS, mss, KIND_WINDOW, shifts];
    if numbers.sack {
        options.extend([KIND_SACK, 0]);
    }
    if numbers.timestamp.is_some() {
        options.extend([KIND_TIMESTAMP, 0]);
    }
    set(libc::TCP_REPAIR_OPTIONS, &options)?;
    if let Some((tsval, _)) = numbers.timestamp {
        // An odd one would make the clock tick in microseconds.
        set(libc::TCP_TIMESTAMP, &[tsval.wrapping_add(tsval & 1)])?;
    }
    let Numbers {
        snd_wnd,
        rcv_wnd,
        rcv_nxt,
        ..
    } = *numbers;
    let window = [rcv_nxt, snd_wnd, snd_wnd, rcv_wnd, rcv_nxt];
    set(libc::TCP_REPAIR_WINDOW, &window)?;
    leave(socket.as_fd())?;
    Ok(socket.into())
}

/// Reads a socket from which nobody reads, and to which nobody writes, meanwhile.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN; of kind `NotConnected` if either side has ended it, or this one has closed
/// its own; of kind `WouldBlock` if it did not hold still; of kind `FileTooLarge` if its queues hold
/// more than the buffers of the services' sockets can.
pub fn read(socket: BorrowedFd<'_>) -> io::Result<Reading> {
    let repair = Repair::enter(socket)?;
    repair.select(RECEIVE_QUEUE)?;
    let (received, unread, info) = read_received(&repair)?;
    let mss: u32 = sys::tcp_option(socket, libc::TCP_MAXSEG)?;
    let clock: u32 = sys::tcp_option(socket, libc::TCP_TIMESTAMP)?;
    repair.select(SEND_QUEUE)?;
    let unacknowledged = peek(socket)?;
    let written = repair.sequence()?;
    repair.select(RECEIVE_QUEUE)?;
    // After what is unacknowledged was read: it may be less by now, so its edge is not overestimated.
    let window = sys::tcp_repair_window(socket)?;
    drop(repair);

    let agreed = |bit| info.tcpi_options & bit != 0;
    let (low, high) = (info.tcpi_snd_rcv_wscale & 15, info.tcpi_snd_rcv_wscale >> 4);
    let (peer_shift, own_shift) = if cfg!(target_endian = "little") {
        (low, high)
    } else {
        (high, low)
    };
    let options = |mss: u32, shift, timestamp| Options {
        mss: Some(mss.min(u16::MAX.into()) as u16),
        window_scale: agreed(WINDOW_SCALE).then_some(shift),
        sack_permitted: agreed(SACK),
        timestamp: agreed(TIMESTAMPS).then_some((timestamp, 0)),
    };
    Ok(Reading {
        received,
        fin: info.tcpi_state == CLOSE_WAIT,
        unread,
        written,
        unacknowledged,
        edge: later(received, window.rcv_wup.wrapping_add(window.rcv_wnd)),
        window: window.snd_wnd,
        peer: options(mss, peer_shift, 0),
        own: options(info.tcpi_advmss, own_shift, clock),
    })
}

/// What was received, and the state, of one instant: the number is the same before and after.
fn read_received(repair: &Repair<'_>) -> io::Result<(u32, Vec<u8>, libc::tcp_info)> {
    let mut received = repair.sequence()?;
    for _ in 0..ATTEMPTS {
        let unread = peek(repair.0)?;
        let info = sys::tcp_info(repair.0)?;
        if ![ESTABLISHED, CLOSE_WAIT].contains(&info.tcpi_state) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let after = repair.sequence()?;
        if after == received {
            return Ok((received, unread, info));
        }
        received = after;
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// All bytes of the selected queue.
fn peek(socket: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    for room in [FEW, ALL] {
        let mut bytes = vec![0; room];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let count = match recv(socket.as_raw_fd(), &mut bytes, flags) {
            Ok(count) => count,
            Err(nix::Error::EAGAIN) => 0,
            Err(error) => return Err(error.into()),
        };
        if count < room {
            bytes.truncate(count);
            return Ok(bytes);
        }
    }
    Err(io::ErrorKind::FileTooLarge.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use socket2::SockRef;

    use super::*;
    use crate::segment::flow_key;

    /// A connection on loopback: the side that is read, and its peer.
    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        SockRef::from(&listener).set_reuse_address(true).unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        (socket, peer)
    }

    /// Waits until as much has arrived.
    fn arrived(socket: &TcpStream, count: usize) {
        let mut bytes = vec![0; count];
        while socket.peek(&mut bytes).unwrap() < count {}
    }

    #[test]
    fn both_queues_are_read_and_the_connection_goes_on() {
        let (mut socket, mut peer) = pair();
        let first = read(socket.as_fd()).unwrap();
        assert_eq!(
            (&first.unread[..], &first.unacknowledged[..]),
            (&[][..], &[][..])
        );
        assert!(!first.fin && first.window > 10_000);
        assert!(first.peer.timestamp.is_some() && first.own.window_scale.is_some());
        peer.write_all(b"to be read, and more").unwrap();
        arrived(&socket, 20);
        let mut taken = [0; 10];
        socket.read_exact(&mut taken).unwrap();
        let second = read(socket.as_fd()).unwrap();
        assert_eq!(second.unread, b", and more");
        assert_eq!(second.received.wrapping_sub(first.received), 20);
        assert_eq!(second.written, first.written);
        let room = second.edge.wrapping_sub(second.received);
        assert!((10_000..1 << 24).contains(&room), "a window of {room}");
        // Nothing was taken, and it still works both ways.
        socket.write_all(b"answer").unwrap();
        let mut heard = [0; 6];
        peer.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"answer");
        let mut rest = [0; 10];
        socket.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b", and more");
        let third = read(socket.as_fd()).unwrap();
        assert_eq!(third.written.wrapping_sub(first.written), 6);
    }

    #[test]
    fn what_the_peer_does_not_read_is_unacknowledged_or_still_to_be_sent() {
        let (mut socket, mut peer) = pair();
        socket.set_nonblocking(true).unwrap();
        let before = read(socket.as_fd()).unwrap();
        let stream: Vec<u8> = (0..8 << 20).map(|at: u32| (at ^ at >> 8) as u8).collect();
        let mut written = 0;
        while let Ok(count) = socket.write(&stream[written..]) {
            written += count;
            if written == stream.len() {
                break;
            }
        }
        SockRef::from(&socket).set_send_buffer_size(4096).unwrap();
        // More than it has room for here; so it is read until it fits.
        let mut got = Vec::new();
        let mut piece = [0; 16_384];
        let reading = loop {
            match read(socket.as_fd()) {
                Ok(reading) => break reading,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::FileTooLarge),
            }
            let count = peer.read(&mut piece).unwrap();
            got.extend_from_slice(&piece[..count]);
        };
        assert_eq!(
            reading.written.wrapping_sub(before.written) as usize,
            written
        );
        assert!(!reading.unacknowledged.is_empty());
        let from = written - reading.unacknowledged.len();
        assert_eq!(reading.unacknowledged, stream[from..written]);
        drop(socket);
        peer.read_to_end(&mut got).unwrap();
        assert_eq!(got, stream[..written], "and it all arrives");
    }

    #[test]
    fn a_half_closed_connection_is_read_and_one_that_has_ended_is_not() {
        let (socket, mut peer) = pair();
        let before = read(socket.as_fd()).unwrap();
        peer.write_all(b"last").unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        arrived(&socket, 4);
        let reading = loop {
            let reading = read(socket.as_fd()).unwrap();
            if reading.fin {
                break reading;
            }
        };
        assert_eq!(reading.unread, b"last");
        assert_eq!(reading.received.wrapping_sub(before.received), 4 + 1);
        let mut bytes = [0; 4];
        (&socket).read_exact(&mut bytes).unwrap();
        assert_eq!((&socket).read(&mut bytes).unwrap(), 0);
        let reading = read(socket.as_fd()).unwrap();
        assert!(reading.fin && reading.unread.is_empty());
        assert_eq!(reading.received.wrapping_sub(before.received), 4 + 1);
        socket.shutdown(Shutdown::Write).unwrap();
        let ended = read(socket.as_fd()).unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::NotConnected);
    }

    /// An accepted socket begins so, and goes further as it sees how much memory the client's segments take.
    #[test]
    fn a_restored_socket_promises_at_first_what_an_accepted_one_does() {
        let restored = |rcv_wnd| {
            let numbers = Numbers {
                flow: flow_key(Ipv4Addr::LOCALHOST, 9, 7),
                vip: Ipv4Addr::LOCALHOST,
                snd_nxt: 1,
                rcv_nxt: 1,
                snd_wnd: 1 << 16,
                rcv_wnd,
                mss: 1448,
                shifts: Some((7, 5)),
                sack: true,
                timestamp: None,
            };
            let socket = restore(&numbers).unwrap();
            // In repair mode it ends without a word, too.
            sys::set_tcp_option(socket.as_fd(), libc::TCP_REPAIR, &[REPAIR_ON]).unwrap();
            let window = sys::tcp_repair_window(socket.as_fd()).unwrap();
            let info = sys::tcp_info(socket.as_fd()).unwrap();
            // In whole segments.
            assert!((60_000..=FIRST_WINDOW).contains(&info.tcpi_rcv_ssthresh));
            window.rcv_wnd
        };
        assert_eq!(restored(0), 0);
        assert_eq!(restored(2 << 20), 2 << 20);
    }

    /// Else nobody could listen on the port while the connection lingers.
    #[test]
    fn a_socket_that_was_read_still_allows_its_address_to_be_used_again() {
        let (socket, _peer) = pair();
        SockRef::from(&socket).set_reuse_address(true).unwrap();
        read(socket.as_fd()).unwrap();
        assert!(SockRef::from(&socket).reuse_address().unwrap());
    }

    /// While data flows both ways at full speed each reading is of one instant.
    #[test]
    fn a_reading_under_load_is_consistent_and_no_byte_is_harmed() {
        const TOTAL: usize = 64 << 20;
        let byte = |at: usize| (at ^ at >> 8) as u8;
        let (mut socket, peer) = pair();
        let mut writer = peer.try_clone().unwrap();
        let mut reader = peer;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let bytes: Vec<u8> = (0..TOTAL).map(byte).collect();
                writer.write_all(&bytes).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                let mut bytes = Vec::new();
                reader.read_to_end(&mut bytes).unwrap();
                assert!(bytes.len() == TOTAL && (0..TOTAL).all(|at| bytes[at] == byte(at)));
            });
            let first = read(socket.as_fd()).unwrap();
            let begin = first.received.wrapping_sub(first.unread.len() as u32);
            let begin_written = first.written;
            let (mut taken, mut piece, mut readings) = (0, vec![0; 60_000], 0);
            loop {
                let count = socket.read(&mut piece).unwrap();
                if count == 0 {
                    break;
                }
                taken += count;
                socket.write_all(&piece[..count]).unwrap();
                let reading = match read(socket.as_fd()) {
                    Ok(reading) => reading,
                    Err(error) => {
                        let kinds = [io::ErrorKind::WouldBlock, io::ErrorKind::FileTooLarge];
                        assert!(kinds.contains(&error.kind()), "{error}");
                        continue;
                    }
                };
                readings += 1;
                let received = reading.received.wrapping_sub(u32::from(reading.fin));
                let next = received.wrapping_sub(reading.unread.len() as u32);
                assert_eq!(next.wrapping_sub(begin) as usize, taken);
                assert!((0..reading.unread.len()).all(|at| reading.unread[at] == byte(taken + at)));
                assert_eq!(reading.written.wrapping_sub(begin_written) as usize, taken);
                let from = taken - reading.unacknowledged.len();
                let sent = &reading.unacknowledged;
                assert!((0..sent.len()).all(|at| sent[at] == byte(from + at)));
            }
            assert!(readings > 100, "{readings} readings");
            socket.shutdown(Shutdown::Both).unwrap();
        });
    }
}
