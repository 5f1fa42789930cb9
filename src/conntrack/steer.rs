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
//!   chain guard3 {                # what may come out of the hop: flows handed over through it
//!     ct direction original ct mark & 0x00ff0000 == 0x00030000 return
//!     ct direction reply ct mark & 0xff000000 == 0x03000000 return
//!     drop
//!   }
//!   chain into3 {                 # into the hop, unless it just came out of it
//!     iifname != "livemig3" meta mark set meta mark & 0x00ffffff | 0x03000000
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

use serde_json::{Value, json};

use super::ruleset::{self, STEER, add, add_empty, rule};
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
    for direction in directions {
        commands.push(rule(
            STEER,
            &[
                ct_direction(direction),
                json!({ "vmap": {
                    "key": ct_mark(direction), "data": format!("@{}", name(direction)),
                } }),
            ],
        ));
    }
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
    commands.push(rule(&guard, &[json!({ "drop": null })]));
    commands.extend(add_empty(&into));
    commands.push(rule(
        &into,
        &[
            json!({ "match": {
                "op": "!=", "left": { "meta": { "key": "iifname" } }, "right": interface,
            } }),
            json!({ "mangle": {
                "key": { "meta": { "key": "mark" } },
                "value": { "|": [
                    { "&": [{ "meta": { "key": "mark" } }, !PACKET_MASK] },
                    packet_mark(hop),
                ] },
            } }),
        ],
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
        rules.remove(DOING, &[guard_chain(hop), into_chain(hop)], || {
            let mut changes = vec![ruleset::delete_element("guard", &interface)];
            for direction in [Direction::Original, Direction::Reply] {
                // Marks are numbers of this host, in its own byte order.
                let key = Mark::to(direction, hop).bits().to_ne_bytes();
                changes.push(ruleset::delete_element(name(direction), &key));
            }
            changes
        })?;
        rules.remove_unused()
    })
    .await
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
