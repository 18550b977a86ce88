//! The interface: found, named, marked, warmed.

use std::net::Ipv4Addr;
use std::time::Duration;

use rfsis_agent::bpf::XdpMode;
use rfsis_agent::netif::{Netif, NetifError};

use crate::frames::{CLIENT, OWN, VIP};
use crate::host::{in_namespace, load, packet_socket, receive, run, veth, wait};

#[test]
fn a_missing_interface_is_named_with_those_that_exist() {
    in_namespace(|| {
        veth(1500);
        let mut programs = load();
        for error in [
            programs.attach_gate("eth7").unwrap_err(),
            programs
                .attach_ingress("eth7", XdpMode::Native)
                .unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains("eth7") && text.contains("eth0"), "{text}");
            assert_eq!(error.exit_code(), 2);
        }
        wait(async {
            let error = Netif::new("eth7").await.unwrap_err();
            let text = error.to_string();
            assert!(text.contains("eth7") && text.contains("eth0"), "{text}");
            let error = Netif::new("lo").await.unwrap_err();
            assert!(matches!(error, NetifError::NotEthernet { .. }), "{error:?}");
        });
    });
}

#[test]
fn an_interface_is_found_with_its_addresses() {
    in_namespace(|| {
        veth(1400);
        run("ip link set eth0 address 02:00:00:00:00:aa");
        wait(async {
            let netif = Netif::new("eth0").await.unwrap();
            assert_eq!(netif.mac, [2, 0, 0, 0, 0, 0xaa]);
            assert_eq!(netif.mtu, 1400);
            assert_eq!(netif.addresses.len(), 1);
            let peer = Ipv4Addr::new(192, 168, 1, 2);
            assert_eq!(netif.own_node(&[OWN, peer]).await.unwrap(), 0);
            assert_eq!(netif.own_node(&[peer, OWN]).await.unwrap(), 1);
            let error = netif.own_node(&[peer, CLIENT]).await.unwrap_err();
            assert!(error.to_string().contains("192.168.1.1"), "{error}");
            assert_eq!(error.exit_code(), 2);
            netif.check_vip(VIP).unwrap();
            let error = netif.check_vip(Ipv4Addr::new(10, 0, 0, 1)).unwrap_err();
            assert!(
                error.to_string().contains("outside any subnet of eth0"),
                "{error}"
            );

            // An address that an operator configured is not ours to remove.
            run(&format!("ip addr add {VIP}/24 dev eth0"));
            assert!(!netif.remove_vip_if_ours(VIP).await.unwrap());
            assert!(run("ip addr show dev eth0").contains("192.168.1.100/24"));
        });
    });
}

#[test]
fn warming_asks_for_the_next_hop_in_the_hosts_own_name() {
    in_namespace(|| {
        veth(1500);
        run("ip route add default via 192.168.1.254");
        let receiver = packet_socket("peer0");
        wait(async {
            let netif = Netif::new("eth0").await.unwrap();
            netif.add_vip(VIP, 24).await.unwrap();
            for (client, next_hop) in [
                (CLIENT, CLIENT),
                (Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(192, 168, 1, 254)),
            ] {
                assert_eq!(netif.warm_next_hop(client).await.unwrap(), next_hop);
                let asked = receive(&receiver, Duration::from_secs(2), |frame| {
                    frame.get(12..14) == Some(&[8, 6])
                        && frame.get(38..42) == Some(&next_hop.octets())
                });
                let asked = asked.unwrap_or_else(|| panic!("no ARP request for {next_hop}"));
                assert_eq!(asked[28..32], OWN.octets(), "asked as the VIP");
            }
        });
    });
}

#[test]
fn next_hops_that_do_not_answer_are_forgotten_but_only_those_of_clients() {
    in_namespace(|| {
        veth(1500);
        let (other, nowhere) = (Ipv4Addr::new(192, 168, 1, 77), Ipv4Addr::new(8, 8, 8, 8));
        wait(async {
            let netif = Netif::new("eth0").await.unwrap();
            for address in [CLIENT, other] {
                netif.warm_next_hop(address).await.unwrap();
            }
            let unresolved = || run("ip neigh show dev eth0");
            assert_eq!(unresolved().matches("INCOMPLETE").count(), 2);
            netif.warm_next_hop(nowhere).await.unwrap_err();
            let clients = [nowhere, CLIENT];
            assert_eq!(netif.forget_unresolved(&clients).await.unwrap(), 1);
            let left = unresolved();
            assert!(!left.contains(&CLIENT.to_string()), "{left}");
            assert!(left.contains(&other.to_string()), "{left}");
            run(&format!(
                "ip neigh replace {CLIENT} lladdr 02:00:00:00:00:32 dev eth0 nud reachable"
            ));
            assert_eq!(netif.forget_unresolved(&clients).await.unwrap(), 0);
            assert!(unresolved().contains("02:00:00:00:00:32"));
        });
    });
}
