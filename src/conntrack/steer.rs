//! The rules that turn a connection's mark into a route, and that guard the hops.
//!
//! ```text
//! table inet livemig {           # (without the chains of holds)
//!   map guard    { type ifname : verdict; elements = { "livemig3" : jump guard3 } }
//!   map original { type mark : verdict;   elements = { 0x03000000 : jump into3 } }
//!   map reply    { type mark : verdict;   elements = { 0x00030000 : jump into3 } }
//!   chain steer {
//!     type filter hook prerouting priority -140
//!     iifname vmap @guard
//!     ct direction original ct mark & 0xff000000 vmap @original
//!     ct direction reply ct mark & 0x00ff0000 vmap @reply
//!   }
//!   set admitted3     { type ipv4_addr }
//!   set admitted3_ip6 { type ipv6_addr }
//!   chain guard3 {                # what may come out of the hop: flows handed over through it
//!     ct direction original ct mark & 0x00ff0000 == 0x00030000 return
//!     ct direction reply ct mark & 0xff000000 == 0x03000000 return
//!     ct mark & 0xffff0000 != 0 ip saddr @admitted3 return        # see `admit`
//!     ct mark & 0xffff0000 != 0 ip daddr @admitted3 return        # (and the same for IPv6)
//!     drop
//!   }
//!   chain steer_output {          # the same for programs of this host
//!     type route hook output priority -140
//!     ct direction original ct mark & 0xff000000 vmap @original
//!     ct direction reply ct mark & 0x00ff0000 vmap @reply
//!   }
//!   chain into3 {                 # into the hop, unless it just came out of it
//!     iifname == "livemig3" return
//!     ...                         # see the module `alias`
//!     meta mark set meta mark & 0x00ffffff | 0x03000000
//!   }
//! }
//! ```
//!
//! A packet passes three rules however many hops there are. ICMP errors belong to the connection
//! they report on and take its way. The guard also drops packets that belong to no connection at
//! all, so nothing but handed-over flows comes out of a hop: no ping of the tunnel's own addresses
//! either.
//!
//! `steer` runs after the holds (−150): what a hold releases goes on *behind* the chain that held
//! it, and has to meet its new mark there.

use std::net::IpAddr;

use rustix::io::Errno;
use serde_json::{Value, json};

use super::alias;
use super::ruleset::{self, Rules, STEER, STEER_OUTPUT, add, add_empty, payload, rule};
use super::{Direction, Mark, Result};
use crate::tunnel::HopId;

/// After conntrack (−200) and the holds (−150), before translation of destinations (−100):
/// `enum nf_ip_hook_priorities` of `linux/netfilter_ipv4.h`.
pub const PRIORITY: i32 = -140;
/// The bits of a packet's mark that carry the chosen hop.
pub const PACKET_MASK: u32 = 0xff00_0000;

/// `IFNAMSIZ` of `linux/if.h`: the size of the key of a map by interface name.
const INTERFACE_NAME: usize = 16;

/// The mark that packets for a hop carry: what the hop's routing rule (`fwmark`, with
/// [`PACKET_MASK`]) looks for.
pub const fn packet_mark(hop: HopId) -> u32 {
    (hop.get() as u32) << 24
}

fn guard_chain(hop: HopId) -> String {
    format!("guard{hop}")
}

fn into_chain(hop: HopId) -> String {
    format!("into{hop}")
}

/// The sets of addresses that [`admit`] fills: nftables' names of the family and the type, and the
/// set's own name.
fn admitted(hop: HopId) -> [(&'static str, &'static str, String); 2] {
    [
        ("ip", "ipv4_addr", format!("admitted{hop}")),
        ("ip6", "ipv6_addr", format!("admitted{hop}_ip6")),
    ]
}

/// The one of them for this address, and the address as the kernel has it.
fn admitted_element(hop: HopId, address: &IpAddr) -> (String, Vec<u8>) {
    let [(.., v4), (.., v6)] = admitted(hop);
    match address {
        IpAddr::V4(address) => (v4, address.octets().to_vec()),
        IpAddr::V6(address) => (v6, address.octets().to_vec()),
    }
}

fn ct_direction(direction: Direction) -> Value {
    json!({ "match": {
        "op": "==", "left": { "ct": { "key": "direction" } }, "right": name(direction),
    } })
}

fn name(direction: Direction) -> &'static str {
    match direction {
        Direction::Original => "original",
        Direction::Reply => "reply",
    }
}

fn ct_mark(direction: Direction) -> Value {
    json!({ "&": [{ "ct": { "key": "mark" } }, Mark::mask(direction).bits()] })
}

/// Puts a hop's guard and its steering in place. It changes nothing if they are there already.
pub async fn install(hop: HopId) -> Result<()> {
    let directions = [Direction::Original, Direction::Reply];
    let interface = hop.interface();
    let (guard, into) = (guard_chain(hop), into_chain(hop));
    let mut commands = ruleset::base();
    commands.push(add(
        "map",
        json!({ "name": "guard", "type": "ifname", "map": "verdict" }),
    ));
    for direction in directions {
        commands.push(add(
            "map",
            json!({ "name": name(direction), "type": "mark", "map": "verdict" }),
        ));
    }
    // Chains are emptied and filled again in the same transaction, so installing twice is
    // installing once, and no packet sees them empty.
    commands.push(ruleset::flush(STEER));
    commands.push(rule(
        STEER,
        &[json!({ "vmap": { "key": { "meta": { "key": "iifname" } }, "data": "@guard" } })],
    ));
    commands.push(ruleset::flush(STEER_OUTPUT));
    for chain in [STEER, STEER_OUTPUT] {
        for direction in directions {
            commands.push(rule(
                chain,
                &[
                    ct_direction(direction),
                    json!({ "vmap": {
                        "key": ct_mark(direction), "data": format!("@{}", name(direction)),
                    } }),
                ],
            ));
        }
    }
    commands.extend(alias::commands());
    commands.extend(add_empty(&guard));
    for direction in directions {
        // What comes out of a hop towards the container is a flow whose other direction goes back
        // into it, and the other way round.
        let back = direction.opposite();
        commands.push(rule(
            &guard,
            &[
                ct_direction(direction),
                json!({ "match": {
                    "op": "==", "left": ct_mark(back), "right": Mark::to(back, hop).bits(),
                } }),
                json!({ "return": null }),
            ],
        ));
    }
    for (ip, kind, set) in admitted(hop) {
        commands.push(add("set", json!({ "name": set, "type": kind })));
        for field in ["saddr", "daddr"] {
            // A packet without a connection has no mark: the rule does not match. A connection that
            // has just begun has none yet.
            commands.push(rule(
                &guard,
                &[
                    json!({ "match": {
                        "op": "!=",
                        "left": { "&": [{ "ct": { "key": "mark" } }, Mark::MASK.bits()] },
                        "right": 0,
                    } }),
                    json!({ "match": {
                        "op": "==", "left": payload(ip, field), "right": format!("@{set}"),
                    } }),
                    json!({ "return": null }),
                ],
            ));
        }
    }
    commands.push(rule(&guard, &[json!({ "drop": null })]));
    commands.extend(add_empty(&into));
    commands.push(rule(
        &into,
        &[
            json!({ "match": {
                "op": "==", "left": { "meta": { "key": "iifname" } }, "right": interface,
            } }),
            json!({ "return": null }),
        ],
    ));
    commands.extend(alias::rules(&into));
    commands.push(rule(
        &into,
        &[json!({ "mangle": {
            "key": { "meta": { "key": "mark" } },
            "value": { "|": [
                { "&": [{ "meta": { "key": "mark" } }, !PACKET_MASK] },
                packet_mark(hop),
            ] },
        } })],
    ));
    let element = |map: &str, key: Value, chain: &str| {
        add(
            "element",
            json!({ "name": map, "elem": [[key, { "jump": { "target": chain } }]] }),
        )
    };
    commands.push(element("guard", json!(interface), &guard));
    for direction in directions {
        let key = json!(Mark::to(direction, hop).bits());
        commands.push(element(name(direction), key, &into));
    }
    ruleset::apply("install the rules of a hop", commands).await
}

/// Removes a hop's guard and its steering, and the table when nothing else uses it. It is no error
/// if they are not there.
pub async fn remove(hop: HopId) -> Result<()> {
    const DOING: &str = "remove the rules of a hop";
    ruleset::blocking(DOING, move |rules| {
        let mut interface = hop.interface().into_bytes();
        interface.resize(INTERFACE_NAME, 0);
        let elements = || {
            let mut changes = vec![ruleset::delete_element("guard", &interface)];
            for direction in [Direction::Original, Direction::Reply] {
                // Marks are numbers of this host, in its own byte order.
                let key = Mark::to(direction, hop).bits().to_ne_bytes();
                changes.push(ruleset::delete_element(name(direction), &key));
            }
            changes
        };
        let sets = || {
            admitted(hop)
                .iter()
                .map(|(.., set)| ruleset::delete_set(set))
                .collect()
        };
        rules.remove_between(DOING, &[guard_chain(hop), into_chain(hop)], elements, sets)?;
        rules.remove_unused()
    })
    .await
}

/// For as long as the path of a container's flows changes, lets them come out of this hop too,
/// whichever hop their marks name: what belongs to a connection that is steered somewhere, and has
/// one of these addresses at either end. Nothing new comes in by this.
///
/// One message to the kernel. Doing it twice is doing it once.
///
/// # Errors
/// When the kernel refuses, as it does if the hop's rules are not [installed](install).
pub fn admit(hop: HopId, addresses: &[IpAddr]) -> Result<()> {
    let elements = addresses.iter().map(|address| {
        let (set, key) = admitted_element(hop, address);
        ruleset::add_element(&set, &key)
    });
    Ok(Rules::open()?.change("admit a container's flows", elements.collect())?)
}

/// Ends what [`admit`] began. It is no error if it was never begun, or if the hop is gone.
///
/// # Errors
/// When the kernel cannot be asked, or refuses.
pub fn dismiss(hop: HopId, addresses: &[IpAddr]) -> Result<()> {
    let mut rules = Rules::open()?;
    for address in addresses {
        let (set, key) = admitted_element(hop, address);
        match rules.change(
            "dismiss a container's flows",
            vec![ruleset::delete_element(&set, &key)],
        ) {
            Err(error) if error.errno() == Some(Errno::NOENT) => {}
            outcome => outcome?,
        }
    }
    Ok(())
}

/// The hops whose rules are in place.
pub async fn installed() -> Result<Vec<HopId>> {
    ruleset::blocking("list the rules of hops", |rules| {
        let chains = rules.chains()?;
        Ok(HopId::all()
            .filter(|hop| chains.contains(&guard_chain(*hop)))
            .collect())
    })
    .await
}
