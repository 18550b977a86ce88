//! A kernel socket made from a shadow's numbers.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use etherparse::{PacketBuilder, TcpOptionElement};
use rfsis_agent::adopt::{Numbers, for_the_kernel};
use rfsis_agent::segment::{Segment, parse};
use rfsis_agent::sys::RawIpSocket;
use rfsis_agent::tcp_repair::{self, restore};
use rfsis_common::maps::Direction;
use socket2::{Domain, Socket, Type};
use tests::patience::wait_until;

use crate::frames::{CLIENT, CLIENT_PORT, FLOW, SERVICE, VIP, from_vip};
use crate::host::{in_namespace, packet_socket, receive, run, veth};

const PATIENCE: Duration = Duration::from_secs(5);

fn numbers() -> Numbers {
    Numbers {
        flow: FLOW,
        vip: VIP,
        // Both wrap around soon.
        snd_nxt: u32::MAX - 1000,
        rcv_nxt: u32::MAX - 5,
        snd_wnd: 50_000,
        rcv_wnd: 90_000,
        mss: 1460,
        shifts: Some((3, 9)),
        sack: true,
        // Odd, and close to its end.
        timestamp: Some((u32::MAX - 20, 70)),
    }
}

/// A host with the VIP, and what leaves it.
fn host() -> OwnedFd {
    veth(1500);
    run("ip link set lo up");
    run(&format!("ip addr add {VIP}/24 dev eth0"));
    run(&format!(
        "ip neigh add {CLIENT} lladdr 02:00:00:00:00:32 dev eth0"
    ));
    run("ethtool -K eth0 tso off gso off tx off");
    packet_socket("peer0")
}

fn listener() -> TcpListener {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.set_reuse_address(true).unwrap();
    let address = std::net::SocketAddrV4::new(VIP, SERVICE);
    listener.bind(&address.into()).unwrap();
    listener.listen(8).unwrap();
    listener.into()
}

/// What the client says, from its IPv4 header on.
fn from_client(seq: u32, ack: u32, tsval: Option<u32>, payload: &[u8]) -> Vec<u8> {
    let options: Vec<_> = tsval
        .map(|tsval| TcpOptionElement::Timestamp(tsval, 0))
        .into_iter()
        .collect();
    let builder = PacketBuilder::ipv4(CLIENT.octets(), VIP.octets(), 64)
        .tcp(CLIENT_PORT, SERVICE, seq, 5000)
        .ack(ack)
        .options(&options)
        .unwrap();
    let mut packet = Vec::new();
    builder.write(&mut packet, payload).unwrap();
    packet
}

/// The next segment that leaves the VIP; `None` if none does for so long.
fn next(wire: &OwnedFd, within: Duration) -> Option<Vec<u8>> {
    receive(wire, within, from_vip)
}

fn read(frame: &[u8]) -> Segment<'_> {
    parse(&frame[14..], Direction::FromVip).unwrap().1
}

/// What the socket has got, once it is so long.
fn read_exactly(mut socket: &TcpStream, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let arrived = wait_until(
        "bytes for the socket",
        || {
            let mut buffer = [0; 4096];
            match socket.read(&mut buffer) {
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            bytes.clone()
        },
        |bytes| bytes.len() >= length,
    );
    assert_eq!(arrived.len(), length);
    arrived
}

#[test]
fn a_restored_socket_goes_on_with_its_numbers() {
    in_namespace(|| {
        let wire = host();
        let _listener = listener();
        let numbers = numbers();
        let mut socket = restore(&numbers).unwrap();
        assert_eq!(next(&wire, Duration::from_millis(50)), None, "it is silent");
        socket.write_all(&[1; 3000]).unwrap();
        let mut seq = numbers.snd_nxt;
        for length in [1448, 1448, 104] {
            let frame = next(&wire, PATIENCE).expect("what was written leaves");
            let segment = read(&frame);
            assert_eq!((segment.seq, segment.payload.len()), (seq, length));
            assert_eq!(segment.ack, Some(numbers.rcv_nxt));
            let window = u32::from(segment.window) << 9;
            assert!(
                window + 512 > numbers.rcv_wnd,
                "the window shrinks to {window}"
            );
            let (tsval, _) = segment.options.timestamp.unwrap();
            let ahead = tsval.wrapping_sub(numbers.timestamp.unwrap().0);
            assert!(ahead < 2_000, "the clock leaps by {ahead}");
            seq = seq.wrapping_add(length as u32);
        }
        let client = RawIpSocket::open("eth0").unwrap();
        let question = from_client(numbers.rcv_nxt, seq, Some(77), b"over the end");
        client.send(&question).unwrap();
        assert_eq!(read_exactly(&socket, 12), b"over the end");
        let frame = next(&wire, PATIENCE).expect("it is acknowledged");
        assert_eq!(read(&frame).ack, Some(numbers.rcv_nxt.wrapping_add(12)));
        assert_eq!(read(&frame).options.timestamp.unwrap().1, 77);
        let reading = tcp_repair::read(socket.as_fd()).unwrap();
        let scales = (reading.peer.window_scale, reading.own.window_scale);
        assert_eq!(scales, (Some(3), Some(9)));
        assert!(reading.peer.sack_permitted && reading.peer.timestamp.is_some());
    });
}

#[test]
fn a_restored_socket_has_no_option_that_was_not_agreed_on() {
    in_namespace(|| {
        let wire = host();
        let numbers = Numbers {
            shifts: None,
            sack: false,
            timestamp: None,
            mss: 1000,
            rcv_wnd: 30_000,
            ..numbers()
        };
        let mut socket = restore(&numbers).unwrap();
        socket.write_all(&[1; 1500]).unwrap();
        for length in [1000, 500] {
            let frame = next(&wire, PATIENCE).unwrap();
            let segment = read(&frame);
            assert_eq!(segment.payload.len(), length);
            assert_eq!(segment.options, Default::default());
            assert!(segment.window >= 30_000, "{}", segment.window);
        }
        // A hole: without SACK, the acknowledgement is all that is said.
        let client = RawIpSocket::open("eth0").unwrap();
        let behind = numbers.rcv_nxt.wrapping_add(100);
        let packet = from_client(behind, numbers.snd_nxt.wrapping_add(1500), None, b"x");
        client.send(&packet).unwrap();
        let frame = next(&wire, PATIENCE).unwrap();
        assert_eq!(frame.len(), 14 + 20 + 20);
        assert_eq!(read(&frame).ack, Some(numbers.rcv_nxt));
    });
}

#[test]
fn the_service_can_be_listened_on_anew_beside_an_adopted_connection() {
    in_namespace(|| {
        let _wire = host();
        let first = listener();
        let _adopted = restore(&numbers()).unwrap();
        drop(first);
        drop(listener());
    });
}

#[test]
fn what_cannot_be_restored_leaves_in_silence() {
    in_namespace(|| {
        let wire = host();
        let _there = restore(&numbers()).unwrap();
        let error = restore(&numbers()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
        let promised_too_much = Numbers {
            snd_wnd: 0,
            rcv_wnd: u32::MAX,
            ..numbers()
        };
        restore(&promised_too_much).unwrap_err();
        assert_eq!(next(&wire, Duration::from_millis(50)), None);
    });
}

#[test]
fn a_late_frame_reaches_the_kernel_without_its_padding_and_with_its_checksum() {
    in_namespace(|| {
        let _wire = host();
        let numbers = numbers();
        let socket = restore(&numbers).unwrap();
        let mut late = from_client(numbers.rcv_nxt, numbers.snd_nxt, Some(1), b"late");
        // As a card that is none leaves it to the next: the sum of the pseudo header alone.
        late[36..38].copy_from_slice(&[0x12, 0x34]);
        late.extend([0; 6]);
        let client = RawIpSocket::open("eth0").unwrap();
        client.send(&for_the_kernel(&late).unwrap()).unwrap();
        assert_eq!(read_exactly(&socket, 4), b"late");
        assert_eq!(for_the_kernel(&late[..30]), None);
    });
}
