//! The kernel's sockets of the VIP.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use rfsis_agent::sockets::VipSockets;
use rfsis_common::maps::State;
use tokio::sync::watch;

use crate::host::{in_namespace, run};

const VIP: Ipv4Addr = Ipv4Addr::LOCALHOST;

fn connected(service: &TcpListener) -> (TcpStream, TcpStream) {
    let mut client = TcpStream::connect(service.local_addr().unwrap()).unwrap();
    client.write_all(b"x").unwrap();
    let mut served = service.accept().unwrap().0;
    // Closed with bytes unread it would send an RST and be gone (RFC 2525 section 2.17).
    served.read_exact(&mut [0]).unwrap();
    (client, served)
}

fn states(port: u16) -> String {
    run(&format!("ss -Htan sport = :{port}"))
}

#[test]
fn what_a_killed_agent_left_is_destroyed_its_listener_and_others_are_not() {
    in_namespace(|| {
        run("ip link set lo up");
        let service = TcpListener::bind((VIP, 0)).unwrap();
        let other = TcpListener::bind((VIP, 0)).unwrap();
        let port = service.local_addr().unwrap().port();
        let (mut client, _served) = connected(&service);
        let (_others_client, _others) = connected(&other);
        // Nobody holds it any more, and the client has not closed: FIN-WAIT-2.
        let (_silent, orphan) = connected(&service);
        drop(orphan);
        assert_eq!(states(port).lines().count(), 3, "{}", states(port));
        let sockets = VipSockets {
            vip: VIP,
            ports: vec![port],
        };
        let (sender, mut state) = watch::channel(State::Standby);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let mut destroy = || runtime.block_on(sockets.destroy(&mut state)).unwrap();
        assert_eq!(destroy(), 2);
        assert!(states(port).starts_with("LISTEN"), "{}", states(port));
        assert_eq!(states(port).lines().count(), 1);
        assert!(client.read(&mut [0]).is_err(), "it was reset");
        let others = states(other.local_addr().unwrap().port());
        assert_eq!(others.lines().count(), 2, "{others}");
        // A connection of the next epoch.
        let (_new, _served) = connected(&service);
        sender.send(State::Active).unwrap();
        assert_eq!(destroy(), 0);
        assert_eq!(states(port).lines().count(), 2);
    });
}
