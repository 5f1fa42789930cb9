//! How livemig's nftables rules get into the kernel and out of it again.
//!
//! Everything is in one table, `inet livemig`. Rules are *added* by `nft`, as JSON through the
//! nftables crate: the kernel's own form of an expression is private to nftables. One call is one
//! transaction. They are *removed* by raw netlink, which is faster, needs no program, works in a
//! destructor, and can name the generation of the rule set it was decided upon, so that the table
//! is never taken away under another process that has just begun to use it.
//!
//! The table's *base chains* come with the first hop or hold and go with the last, and never in
//! between: whenever a base chain goes, anybody's, the kernel drops every packet that waits in any
//! queue of the network namespace (`nf_queue_nf_hook_drop` of `net/netfilter/core.c`), and one that
//! passes a queue at that moment may miss a hook. So a hold is a rule that jumps, not a chain with
//! a hook of its own.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use neli::consts::nl::NlmF;
use neli::consts::socket::NlFamily;
use nftables::helper::{self, NftablesError};
use rustix::io::Errno;
use serde::Serialize;
use serde_json::{Value, json};

use super::wire::{self, NFPROTO_INET, SUBSYS_NFTABLES, nft};
use super::{Error, Mark, Result};
use crate::netlink::{self, Attributes, Body, Channel, Request};

/// The name of livemig's table.
pub const TABLE: &str = "livemig";
/// Gives packets their real destination back that a hop could not carry with it.
pub(super) const UNALIAS: &str = "unalias";
/// Holds what is new, before conntrack; of packets that come in, and of those of programs here.
pub(super) const NEW: [&str; 2] = ["new", "new_output"];
/// Holds what conntrack knows.
pub(super) const ESTABLISHED: [&str; 2] = ["established", "established_output"];
/// Decides about connections that begin: see [`fence`](super::fence), [`forward`](super::forward).
pub(super) const ARRIVALS: [&str; 2] = ["arrivals", "arrivals_output"];
/// Guards and steers.
pub(super) const STEER: &str = "steer";
/// Steers what programs of this host send.
pub(super) const STEER_OUTPUT: &str = "steer_output";
/// Carries connections that begin to another host.
pub(super) const FORWARD: [&str; 2] = ["forward", "forward_output"];
/// Translates sources of what is carried to another host, and as a rule nothing. The kernel
/// translates packets, also those of old connections, only while there is some chain of type nat:
/// this one keeps the bindings of containers that have left alive when the last one of somebody
/// else's goes.
pub(super) const TRANSLATE: &str = "translate";
/// The chains that belong to no hop and to no hold: their names, types, hooks and priorities.
///
/// What programs of this host send goes through `output` instead of `prerouting`. A chain of type
/// `route` has packets routed again that it marks.
const BASE_CHAINS: [(&str, &str, &str, i32); 12] = [
    (UNALIAS, "filter", "prerouting", super::alias::PRIORITY),
    (NEW[0], "filter", "prerouting", super::hold::NEW_PRIORITY),
    (NEW[1], "filter", "output", super::hold::NEW_PRIORITY),
    (
        ESTABLISHED[0],
        "filter",
        "prerouting",
        super::hold::PRIORITY,
    ),
    (ESTABLISHED[1], "filter", "output", super::hold::PRIORITY),
    (ARRIVALS[0], "filter", "prerouting", ARRIVALS_PRIORITY),
    (ARRIVALS[1], "filter", "output", ARRIVALS_PRIORITY),
    (STEER, "filter", "prerouting", super::steer::PRIORITY),
    (STEER_OUTPUT, "route", "output", super::steer::PRIORITY),
    // Just before `NF_IP_PRI_NAT_DST` of `linux/netfilter_ipv4.h`, where Podman's ports are.
    (FORWARD[0], "nat", "prerouting", -101),
    (FORWARD[1], "nat", "output", -101),
    // `NF_IP_PRI_NAT_SRC` of `linux/netfilter_ipv4.h`.
    (TRANSLATE, "nat", "postrouting", 100),
];
/// Behind the holds, for what they let go, and before steering.
const ARRIVALS_PRIORITY: i32 = -145;
/// How long `nft` may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a removal is tried while others change the rule set.
const REMOVAL_TRIES: u32 = 100;

/// A JSON object of nftables, with the family and the table filled in.
pub(super) fn object(kind: &str, mut fields: Value) -> Value {
    if let Some(map) = fields.as_object_mut() {
        map.insert("family".to_owned(), json!("inet"));
        map.insert("table".to_owned(), json!(TABLE));
    }
    json!({ kind: fields })
}

/// A command that adds an object.
pub(super) fn add(kind: &str, fields: Value) -> Value {
    json!({ "add": object(kind, fields) })
}

/// Matches what came out of a hop, whichever.
pub(super) fn out_of_a_hop() -> Value {
    equal(incoming_interface(), "livemig*")
}

/// Matches everything else.
pub(super) fn not_out_of_a_hop() -> Value {
    json!({ "match": { "op": "!=", "left": incoming_interface(), "right": "livemig*" } })
}

fn incoming_interface() -> Value {
    json!({ "meta": { "key": "iifname" } })
}

/// Matches the first packets of a connection.
pub(super) fn begins() -> Value {
    json!({ "match": { "op": "in", "left": { "ct": { "key": "state" } }, "right": "new" } })
}

/// Matches connections that take no hop in either direction.
pub(super) fn not_steered() -> Value {
    equal(
        json!({ "&": [{ "ct": { "key": "mark" } }, Mark::MASK.bits()] }),
        0,
    )
}

/// Commands that add a chain, or empty it if it is there.
pub(super) fn add_empty(chain: &str) -> [Value; 2] {
    [add("chain", json!({ "name": chain })), flush(chain)]
}

/// A command that empties a chain.
pub(super) fn flush(chain: &str) -> Value {
    json!({ "flush": object("chain", json!({ "name": chain })) })
}

/// A command that appends a rule to a chain.
pub(super) fn rule(chain: &str, statements: &[Value]) -> Value {
    add("rule", json!({ "chain": chain, "expr": statements }))
}

/// The same, with a comment by which [`Rules::remove`] finds it again.
pub(super) fn named_rule(chain: &str, name: &str, statements: &[Value]) -> Value {
    add(
        "rule",
        json!({ "chain": chain, "expr": statements, "comment": name }),
    )
}

/// What nftables calls the protocol of an address.
pub(super) fn ip(address: &IpAddr) -> &'static str {
    if address.is_ipv6() { "ip6" } else { "ip" }
}

/// Commands that have both chains of a pair jump to `chain`, in rules named like it.
pub(super) fn jumps(from: [&str; 2], chain: &str) -> [Value; 2] {
    from.map(|base| named_rule(base, chain, &[json!({ "jump": { "target": chain } })]))
}

/// A field of a packet's header.
pub(super) fn payload(protocol: &str, field: &str) -> Value {
    json!({ "payload": { "protocol": protocol, "field": field } })
}

/// A statement that lets on only packets in which the two are equal.
pub(super) fn equal(left: impl Into<Value>, right: impl Serialize) -> Value {
    json!({ "match": { "op": "==", "left": left.into(), "right": json!(right) } })
}

/// The commands that make the table and its base chains exist.
pub(super) fn base() -> Vec<Value> {
    let mut commands = vec![json!({ "add": { "table": { "family": "inet", "name": TABLE } } })];
    for (name, kind, hook, priority) in BASE_CHAINS {
        commands.push(add(
            "chain",
            json!({
                "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
            }),
        ));
    }
    commands
}

/// Hands commands to `nft`, as one transaction.
///
/// They go as its argument, by the crate's call for listing rules. The call for applying rules
/// writes them to nft's standard input, but leaves nft's standard error to the terminal: nothing
/// would be left to put into an error message. What is sent here has a few thousand bytes; the
/// system's limit for an argument is 128 KiB.
pub(super) async fn apply(doing: &'static str, commands: Vec<Value>) -> Result<()> {
    let payload = json!({ "nftables": commands }).to_string();
    tracing::trace!(%payload, "nft");
    let applied = tokio::time::timeout(
        PATIENCE,
        helper::get_current_ruleset_raw_async(helper::DEFAULT_NFT, [&payload]),
    )
    .await;
    match applied {
        Err(_) => Err(Error::NftSilent {
            doing,
            waited: PATIENCE,
        }),
        Ok(Ok(_)) => Ok(()),
        Ok(Err(e)) => Err(explain(doing, e)),
    }
}

fn explain(doing: &'static str, error: NftablesError) -> Error {
    match error {
        NftablesError::NftExecution { program, inner } => Error::NftExecution {
            doing,
            program: program.to_string_lossy().into_owned(),
            source: inner,
        },
        NftablesError::NftFailed { stdout, stderr, .. } => Error::NftRefused {
            doing,
            stderr: said(&stderr, &stdout),
        },
        other => Error::NftRefused {
            doing,
            stderr: other.to_string(),
        },
    }
}

/// What nft said about a failure, without the input that it quotes in between.
fn said(stderr: &str, stdout: &str) -> String {
    let lines: Vec<&str> = stderr
        .lines()
        .chain(stdout.lines())
        .map(str::trim)
        .filter(|line| line.contains("rror"))
        .take(5)
        .collect();
    if lines.is_empty() {
        "it ended with a failure and said nothing".to_owned()
    } else {
        lines.join("; ")
    }
}

/// A raw connection to nf_tables in the calling thread's network namespace.
#[derive(Debug)]
pub(super) struct Rules(
    Channel,
    /// Whether this kernel was found not to have nftables' own expression for queues.
    bool,
);

impl Rules {
    pub(super) fn open() -> Result<Rules> {
        Ok(Rules(Channel::open(NlFamily::Netfilter)?, false))
    }

    /// The names of the table's chains; none if there is no table.
    pub(super) fn chains(&mut self) -> Result<BTreeSet<String>> {
        let request = Request::new(nft::GETCHAIN, Body::netfilter(NFPROTO_INET, 0));
        let names = self.0.dump("list chains", &request, |found, message| {
            let mut table = String::new();
            let mut chain = String::new();
            for attribute in Attributes::after(message.body, 4) {
                match attribute.kind {
                    nft::CHAIN_TABLE => table = attribute.text(),
                    nft::CHAIN_NAME => chain = attribute.text(),
                    _ => {}
                }
            }
            if table == TABLE {
                found.push(chain);
            }
        })?;
        Ok(names.into_iter().collect())
    }

    /// The generation of the rule set: it changes with every transaction of anybody.
    fn generation(&mut self) -> Result<u32> {
        let request = Request::new(nft::GETGEN, Body::netfilter(0, 0));
        self.0
            .ask("read the generation of the rules", request)?
            .iter()
            .find_map(|body| {
                Attributes::after(body, 4)
                    .find(|a| a.kind == nft::GEN_ID)?
                    .be32()
            })
            .ok_or(Error::Netlink(netlink::Error::Malformed {
                doing: "read the generation of the rules",
                what: "no generation in it",
            }))
    }

    /// Commits changes to the table in one transaction; with a generation, only if nobody has
    /// changed any rule since (else the error number is RESTART).
    fn commit(
        &mut self,
        doing: &'static str,
        generation: Option<u32>,
        changes: Vec<Request>,
    ) -> netlink::Result<()> {
        let mut begin = Body::netfilter(0, SUBSYS_NFTABLES);
        if let Some(generation) = generation {
            begin.leaf(wire::BATCH_GENID, &generation.to_be_bytes());
        }
        self.0.transact(
            doing,
            Request::new(wire::BATCH_BEGIN, begin),
            changes,
            Request::new(wire::BATCH_END, Body::netfilter(0, SUBSYS_NFTABLES)),
        )
    }

    /// Appends the rule to `chain` that sends packets to a queue, or past it while nobody listens
    /// to the queue. With nftables' own expression where the kernel has it, else with the xtables
    /// target.
    pub(super) fn add_queue(&mut self, chain: &str, queue: u16) -> Result<()> {
        const DOING: &str = "send packets to a queue";
        if !self.1 {
            match self.commit(
                DOING,
                None,
                vec![expression_rule(chain, &native_queue(queue))],
            ) {
                Err(e) if e.errno() == Some(Errno::NOENT) => {}
                outcome => return Ok(outcome?),
            }
            tracing::debug!("no nft_queue in this kernel: trying the xtables target");
            self.1 = true;
        }
        match self.commit(
            DOING,
            None,
            vec![expression_rule(chain, &xtables_queue(queue))],
        ) {
            Err(e) if e.errno() == Some(Errno::NOENT) => Err(Error::NoQueue),
            outcome => Ok(outcome?),
        }
    }

    /// Changes the table in one transaction, without another start of nft.
    pub(super) fn change(
        &mut self,
        doing: &'static str,
        changes: Vec<Request>,
    ) -> netlink::Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        self.commit(doing, None, changes)
    }

    /// Appends a rule to `chain` that jumps to another, without another start of nft.
    pub(super) fn add_jump(&mut self, doing: &'static str, chain: &str, to: &str) -> Result<()> {
        Ok(self.commit(doing, None, vec![jump_rule(chain, to)])?)
    }

    /// The keys of a set or map; none if it is not there.
    pub(super) fn keys(&mut self, set: &str) -> Result<Vec<Vec<u8>>> {
        let mut body = Body::netfilter(NFPROTO_INET, 0);
        body.text(nft::ELEMENTS_TABLE, TABLE)
            .text(nft::ELEMENTS_SET, set);
        let request = Request::new(nft::GETSETELEM, body);
        let listed = self.0.dump("list elements", &request, |found, message| {
            let lists = Attributes::after(message.body, 4).filter(|a| a.kind == nft::ELEMENTS);
            for element in lists.flat_map(|list| list.nested()) {
                let key = element.nested().find(|a| a.kind == nft::ELEMENT_KEY);
                let value = key.and_then(|key| key.nested().find(|a| a.kind == nft::DATA_VALUE));
                found.extend(value.map(|value| value.value.to_vec()));
            }
        });
        match listed {
            Err(e) if e.errno() == Some(Errno::NOENT) => Ok(Vec::new()),
            listed => Ok(listed?),
        }
    }

    /// The handles of the rules of the base chains that carry one of these names as their comment,
    /// with their chains.
    fn named_rules(&mut self, names: &[String]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut body = Body::netfilter(NFPROTO_INET, 0);
        body.text(nft::RULE_TABLE, TABLE);
        let request = Request::new(nft::GETRULE, body);
        let rules = self.0.dump("list rules", &request, |found, message| {
            let (mut table, mut chain) = (String::new(), String::new());
            let (mut handle, mut data): (&[u8], &[u8]) = (&[], &[]);
            for attribute in Attributes::after(message.body, 4) {
                match attribute.kind {
                    nft::RULE_TABLE => table = attribute.text(),
                    nft::RULE_CHAIN => chain = attribute.text(),
                    nft::RULE_HANDLE => handle = attribute.value,
                    nft::RULE_USERDATA => data = attribute.value,
                    _ => {}
                }
            }
            if table == TABLE
                && names
                    .iter()
                    .any(|name| comment(data) == Some(name.as_bytes()))
            {
                found.push((chain, handle.to_vec()));
            }
        })?;
        Ok(rules)
    }

    /// Removes the chains that `belongs` names with everything in them, in this order, and the
    /// rules of base chains that are named like one of them. Nothing happens to what is not there.
    ///
    /// `before` are changes that have to come first: of what else refers to the chains.
    pub(super) fn remove(
        &mut self,
        doing: &'static str,
        belongs: &[String],
        before: impl Fn() -> Vec<Request>,
    ) -> Result<()> {
        self.remove_between(doing, belongs, before, Vec::new)
    }

    /// The same, with changes that have to come last: of what the chains' rules referred to.
    pub(super) fn remove_between(
        &mut self,
        doing: &'static str,
        belongs: &[String],
        before: impl Fn() -> Vec<Request>,
        after: impl Fn() -> Vec<Request>,
    ) -> Result<()> {
        for _ in 0..REMOVAL_TRIES {
            let generation = self.generation()?;
            let present = self.chains()?;
            if !belongs.iter().any(|chain| present.contains(chain)) {
                return Ok(());
            }
            let mut changes = before();
            for (chain, handle) in self.named_rules(belongs)? {
                let mut body = Body::netfilter(NFPROTO_INET, 0);
                body.text(nft::RULE_TABLE, TABLE)
                    .text(nft::RULE_CHAIN, &chain)
                    .leaf(nft::RULE_HANDLE, &handle);
                changes.push(Request::new(nft::DELRULE, body));
            }
            for chain in belongs.iter().filter(|chain| present.contains(*chain)) {
                let mut body = Body::netfilter(NFPROTO_INET, 0);
                body.text(nft::CHAIN_TABLE, TABLE)
                    .text(nft::CHAIN_NAME, chain);
                changes.push(Request::new(nft::DELCHAIN, body));
            }
            changes.extend(after());
            match self.commit(doing, Some(generation), changes) {
                // Somebody has changed the rules since they were looked at.
                Err(e) if is_restart(&e) => {}
                outcome => return Ok(outcome?),
            }
        }
        Err(busy(doing))
    }

    /// Removes the table if no hop and no hold is left in it.
    pub(super) fn remove_unused(&mut self) -> Result<()> {
        const DOING: &str = "remove the unused table of rules";
        for _ in 0..REMOVAL_TRIES {
            let generation = self.generation()?;
            let present = self.chains()?;
            let ours = |chain: &String| BASE_CHAINS.iter().any(|(name, ..)| name == chain);
            if present.is_empty() || !present.iter().all(ours) {
                return Ok(());
            }
            // Packets on other processors may still be on their way through rules that are gone.
            settle_packets();
            let mut body = Body::netfilter(NFPROTO_INET, 0);
            body.text(nft::TABLE_NAME, TABLE);
            match self.commit(
                DOING,
                Some(generation),
                vec![Request::new(nft::DELTABLE, body)],
            ) {
                Err(e) if is_restart(&e) => {}
                outcome => return Ok(outcome?),
            }
        }
        Err(busy(DOING))
    }
}

/// Waits until every processor has done with the packet it is at, a few milliseconds.
///
/// The kernel waits for that ("a grace period") when a packet socket is closed: `packet_release` of
/// `net/packet/af_packet.c` calls `synchronize_net`.
pub(super) fn settle_packets() {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let opened = socket_with(
        AddressFamily::PACKET,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    );
    if let Err(errno) = opened {
        tracing::warn!(%errno, "cannot wait for packets that are on their way");
    }
}

fn busy(doing: &'static str) -> Error {
    netlink::Error::Inconsistent {
        doing,
        tries: REMOVAL_TRIES,
    }
    .into()
}

/// The comment in a rule's user data: `NFTNL_UDATA_RULE_COMMENT` of libnftnl's `udata.h`, type 0,
/// one byte of length, text with a zero byte.
fn comment(data: &[u8]) -> Option<&[u8]> {
    let [0, length, rest @ ..] = data else {
        return None;
    };
    rest.get(..usize::from(*length))?.strip_suffix(&[0])
}

/// Runs what changes rules on a thread where it may block, in the network namespace of the caller.
pub(super) async fn blocking<T: Send + 'static>(
    doing: &'static str,
    work: impl FnOnce(&mut Rules) -> Result<T> + Send + 'static,
) -> Result<T> {
    // Opened here, in the caller's namespace.
    let mut rules = Rules::open()?;
    tokio::task::spawn_blocking(move || work(&mut rules))
        .await
        .map_err(|_| Error::Thread { doing })?
}

/// ERESTART is the kernel's answer to an outdated generation. It is not meant for user space and
/// so has no name there (`include/linux/errno.h`).
fn is_restart(error: &netlink::Error) -> bool {
    error
        .errno()
        .is_some_and(|errno| errno.raw_os_error() == 85)
}

/// A request that appends a rule to `chain` that jumps to another.
pub(super) fn jump_rule(chain: &str, to: &str) -> Request {
    expression_rule(chain, &jump(to))
}

/// A request that removes all rules of a chain.
pub(super) fn flush_chain(chain: &str) -> Request {
    let mut body = Body::netfilter(NFPROTO_INET, 0);
    body.text(nft::RULE_TABLE, TABLE)
        .text(nft::RULE_CHAIN, chain);
    Request::new(nft::DELRULE, body)
}

fn expression_rule(chain: &str, expression: &Body) -> Request {
    let mut body = Body::netfilter(NFPROTO_INET, 0);
    body.text(nft::RULE_TABLE, TABLE)
        .text(nft::RULE_CHAIN, chain)
        .nest(nft::RULE_EXPRESSIONS, |list| {
            list.nest(nft::LIST_ELEM, |element| element.append(expression));
        });
    Request::new(nft::NEWRULE, body).with(NlmF::CREATE | NlmF::APPEND)
}

/// `jump CHAIN`.
fn jump(to: &str) -> Body {
    let mut body = Body::default();
    body.text(nft::EXPR_NAME, "immediate")
        .nest(nft::EXPR_DATA, |data| {
            data.leaf(
                nft::IMMEDIATE_REGISTER,
                &nft::REGISTER_VERDICT.to_be_bytes(),
            )
            .nest(nft::IMMEDIATE_DATA, |data| {
                data.nest(nft::DATA_VERDICT, |verdict| {
                    verdict
                        .leaf(nft::VERDICT_CODE, &nft::JUMP.to_be_bytes())
                        .text(nft::VERDICT_CHAIN, to);
                });
            });
        });
    body
}

/// `queue flags bypass to N`.
fn native_queue(queue: u16) -> Body {
    let mut body = Body::default();
    body.text(nft::EXPR_NAME, "queue")
        .nest(nft::EXPR_DATA, |data| {
            data.leaf(nft::QUEUE_NUM, &queue.to_be_bytes())
                .leaf(nft::QUEUE_TOTAL, &1u16.to_be_bytes())
                .leaf(nft::QUEUE_FLAGS, &nft::FLAG_BYPASS.to_be_bytes());
        });
    body
}

/// The xtables target NFQUEUE, revision 3, by way of nft_compat.
fn xtables_queue(queue: u16) -> Body {
    // struct xt_NFQ_info_v3: queue number, number of queues, flags, in host byte order; padded to
    // the eight bytes that XT_ALIGN asks for.
    let mut info = [0u8; 8];
    info[0..2].copy_from_slice(&queue.to_ne_bytes());
    info[2..4].copy_from_slice(&1u16.to_ne_bytes());
    info[4..6].copy_from_slice(&nft::FLAG_BYPASS.to_ne_bytes());
    let mut body = Body::default();
    body.text(nft::EXPR_NAME, "target")
        .nest(nft::EXPR_DATA, |data| {
            data.text(nft::TARGET_NAME, "NFQUEUE")
                .leaf(nft::TARGET_REV, &3u32.to_be_bytes())
                .leaf(nft::TARGET_INFO, &info);
        });
    body
}

/// A request that removes an element of a set or a map, by its key as the kernel has it.
pub(super) fn delete_element(set: &str, key: &[u8]) -> Request {
    Request::new(nft::DELSETELEM, element(set, key))
}

/// A request that adds an element to a set, by its key as the kernel has it. It is no error if it
/// is there.
pub(super) fn add_element(set: &str, key: &[u8]) -> Request {
    Request::new(nft::NEWSETELEM, element(set, key)).with(NlmF::CREATE)
}

/// The same of a map.
pub(super) fn add_mapping(map: &str, key: &[u8], value: &[u8]) -> Request {
    Request::new(nft::NEWSETELEM, mapping(map, key, Some(value))).with(NlmF::CREATE)
}

fn element(set: &str, key: &[u8]) -> Body {
    mapping(set, key, None)
}

fn mapping(set: &str, key: &[u8], value: Option<&[u8]>) -> Body {
    let mut body = Body::netfilter(NFPROTO_INET, 0);
    body.text(nft::ELEMENTS_TABLE, TABLE)
        .text(nft::ELEMENTS_SET, set)
        .nest(nft::ELEMENTS, |list| {
            list.nest(nft::LIST_ELEM, |element| {
                element.nest(nft::ELEMENT_KEY, |data| {
                    data.leaf(nft::DATA_VALUE, key);
                });
                if let Some(value) = value {
                    element.nest(nft::ELEMENT_DATA, |data| {
                        data.leaf(nft::DATA_VALUE, value);
                    });
                }
            });
        });
    body
}

/// A request that removes a set that no rule refers to any more.
pub(super) fn delete_set(set: &str) -> Request {
    let mut body = Body::netfilter(NFPROTO_INET, 0);
    body.text(nft::SET_TABLE, TABLE).text(nft::SET_NAME, set);
    Request::new(nft::DELSET, body)
}
