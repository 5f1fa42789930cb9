//! The kernel's table of connections.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use neli::consts::nl::NlmF;
use neli::consts::socket::NlFamily;
use rustix::io::Errno;

use super::entry::naming;
use super::wire::{self, AF_INET, AF_INET6, AF_UNSPEC, cta, filter};
use super::{Change, Entry, Error, Events, Mark, Result, TcpInfo, Tuple};
use crate::netlink::{self, Body, Channel, Namespace, Request};

/// Which addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4 and IPv6.
    Both,
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(address: IpAddr) -> Family {
        if address.is_ipv6() {
            Family::V6
        } else {
            Family::V4
        }
    }

    const fn number(self) -> u8 {
        match self {
            Family::Both => AF_UNSPEC,
            Family::V4 => AF_INET,
            Family::V6 => AF_INET6,
        }
    }
}

/// The kernel's table of connections in one network namespace. Cheap to clone.
///
/// What it does takes microseconds per connection. Nothing is lost when a call is dropped: it goes
/// on to its end in the background.
#[derive(Debug, Clone)]
pub struct Table {
    channel: Arc<Mutex<Channel>>,
    namespace: Namespace,
}

impl Table {
    /// Opens the table of a namespace.
    pub fn open(namespace: &Namespace) -> Result<Table> {
        let channel = namespace.run(|| Channel::open(NlFamily::Netfilter))??;
        Ok(Table {
            channel: Arc::new(Mutex::new(channel)),
            namespace: namespace.clone(),
        })
    }

    /// Works on the channel in one of tokio's blocking threads.
    async fn with<T: Send + 'static>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&mut Channel) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let channel = Arc::clone(&self.channel);
        tokio::task::spawn_blocking(move || {
            // A panic while it was locked leaves at worst unread answers in it, which later
            // exchanges tell from theirs by their numbers.
            work(&mut channel.lock().unwrap_or_else(PoisonError::into_inner))
        })
        .await
        .map_err(|_| Error::Thread { doing })?
    }

    /// Every connection.
    pub async fn dump(&self, family: Family) -> Result<Vec<Entry>> {
        self.with("list connections", move |channel| {
            let request = Request::new(wire::CT_GET, Body::netfilter(family.number(), 0));
            dump(channel, &request, |_| true)
        })
        .await
    }

    /// Every connection of a container: those whose answers come from its address, and those that
    /// it opened.
    pub async fn dump_container(&self, address: IpAddr) -> Result<Vec<Entry>> {
        self.with("list connections", move |channel| {
            dump_container(channel, address)
        })
        .await
    }

    /// The connection with this original tuple, if there is one.
    pub async fn get(&self, original: &Tuple) -> Result<Option<Entry>> {
        let original = *original;
        self.with("look up a connection", move |channel| {
            get(channel, &original, 0)
        })
        .await
    }

    /// Inserts a connection. If the very same one is there already it gets this one's mark.
    pub async fn insert(&self, entry: &Entry) -> Result<()> {
        self.insert_all(vec![entry.clone()])
            .await?
            .pop()
            .unwrap_or(Ok(()))
    }

    /// Inserts many connections; returns what became of each, in order.
    pub async fn insert_all(&self, entries: Vec<Entry>) -> Result<Vec<Result<()>>> {
        const DOING: &str = "insert connections";
        self.with(DOING, move |channel| {
            let outcomes = channel.ask_all(
                DOING,
                entries.iter().map(|entry| {
                    Request::new(wire::CT_NEW, entry.encode()).with(NlmF::CREATE | NlmF::EXCL)
                }),
            )?;
            Ok(outcomes
                .into_iter()
                .zip(entries)
                .map(|(outcome, entry)| match outcome {
                    Ok(()) => Ok(()),
                    Err(e) if e.errno() == Some(Errno::EXIST) => settle(channel, entry),
                    Err(source) => Err(refused("insert", &entry.original, source)),
                })
                .collect())
        })
        .await
    }

    /// Sets the bits of `mask` in the mark of the connection with this original tuple, in one
    /// step, leaving the others alone.
    pub async fn set_mark(&self, original: &Tuple, mark: Mark, mask: Mark) -> Result<()> {
        self.set_mark_all(vec![(*original, mark, mask)])
            .await?
            .pop()
            .unwrap_or(Ok(()))
    }

    /// The same for many; returns what became of each, in order. A connection that has ended in
    /// the meantime is an error whose [`Error::is_gone`] says so.
    pub async fn set_mark_all(&self, marks: Vec<(Tuple, Mark, Mark)>) -> Result<Vec<Result<()>>> {
        const DOING: &str = "mark connections";
        self.with(DOING, move |channel| {
            let outcomes = channel.ask_all(
                DOING,
                marks
                    .iter()
                    .map(|(original, mark, mask)| marking(original, *mark, *mask)),
            )?;
            Ok(outcomes
                .into_iter()
                .zip(&marks)
                .map(|(outcome, (original, ..))| {
                    outcome.map_err(|source| refused("mark", original, source))
                })
                .collect())
        })
        .await
    }

    /// Makes connections over again whose packets are going to leave by another interface, with
    /// marks as in [`set_mark_all`](Table::set_mark_all). Returns what became of each, in order.
    ///
    /// A connection that a rule `masquerade` has translated is forgotten by the kernel, and its
    /// packet dropped, as soon as one leaves by another interface than the first did
    /// (`nf_nat_oif_changed` of `net/netfilter/nf_nat_core.c`), or when that interface goes. One that
    /// was inserted with the same translation is tied to none.
    ///
    /// For microseconds the kernel does not know the connection: the caller must keep its packets of
    /// both directions from conntrack. Packets that it has looked up before are dropped after.
    pub async fn pin_all(&self, entries: Vec<(Entry, Mark, Mark)>) -> Result<Vec<Result<()>>> {
        const DOING: &str = "make connections over again";
        self.with(DOING, move |channel| {
            // Both requests of a connection go in one message: a window has room for whole pairs.
            let requests = entries.iter().flat_map(|(entry, mark, mask)| {
                let mut pinned = entry.clone();
                pinned.mark = entry.mark.with(*mark, *mask);
                pinned.tcp = entry.tcp.map(TcpInfo::liberal);
                let new = Request::new(wire::CT_NEW, pinned.encode_translated());
                [
                    Request::new(wire::CT_DELETE, naming(&entry.original, entry.zone)),
                    new.with(NlmF::CREATE | NlmF::EXCL),
                ]
            });
            let outcomes = channel.ask_all(DOING, requests)?;
            let mut outcomes = outcomes.into_iter();
            let mut done = Vec::with_capacity(entries.len());
            for (entry, ..) in &entries {
                let (deleted, made) = (outcomes.next(), outcomes.next());
                let both = deleted.unwrap_or(Ok(())).and(made.unwrap_or(Ok(())));
                done.push(
                    both.map_err(|source| refused("make over again", &entry.original, source)),
                );
            }
            Ok(done)
        })
        .await
    }

    /// Makes the kernel forget a connection. It is no error if it has already.
    pub async fn delete(&self, original: &Tuple) -> Result<()> {
        self.delete_all(vec![*original])
            .await?
            .pop()
            .unwrap_or(Ok(()))
    }

    /// The same for many; returns what became of each, in order.
    pub async fn delete_all(&self, originals: Vec<Tuple>) -> Result<Vec<Result<()>>> {
        const DOING: &str = "delete connections";
        self.with(DOING, move |channel| {
            let outcomes = channel.ask_all(
                DOING,
                originals
                    .iter()
                    .map(|original| Request::new(wire::CT_DELETE, naming(original, 0))),
            )?;
            Ok(outcomes
                .into_iter()
                .zip(&originals)
                .map(|(outcome, original)| match outcome {
                    Err(e) if e.errno() == Some(Errno::NOENT) => Ok(()),
                    outcome => outcome.map_err(|source| refused("delete", original, source)),
                })
                .collect())
        })
        .await
    }

    /// These changes to connections from now on, read from a socket of its own. Needs a tokio
    /// runtime.
    pub fn events(&self, changes: &[Change]) -> Result<Events> {
        Events::open(&self.namespace, changes)
    }
}

impl Error {
    /// Whether the reason is that the connection is not there any more.
    pub fn is_gone(&self) -> bool {
        matches!(self, Error::Connection { source, .. } if source.errno() == Some(Errno::NOENT))
    }
}

fn refused(doing: &'static str, original: &Tuple, source: netlink::Error) -> Error {
    Error::Connection {
        doing,
        tuple: Box::new(*original),
        source,
    }
}

fn dump(
    channel: &mut Channel,
    request: &Request,
    wanted: impl Fn(&Entry) -> bool,
) -> Result<Vec<Entry>> {
    Ok(channel.dump("list connections", request, |found, message| {
        found.extend(Entry::decode(message).filter(&wanted));
    })?)
}

/// Two dumps, by the source of either direction, that the kernel filters: a host may have hundreds
/// of thousands of connections, and the container is frozen while this runs. Kernels before 5.8 do
/// not know the filter and send everything, so it is looked at here again.
///
/// For IPv6 the kernel's filter is of no use: it lets through what does *not* match (seen with 6.18;
/// `ctnetlink_filter_match_tuple` of `net/netfilter/nf_conntrack_netlink.c`).
fn dump_container(channel: &mut Channel, address: IpAddr) -> Result<Vec<Entry>> {
    if address.is_ipv6() {
        let request = Request::new(wire::CT_GET, Body::netfilter(Family::V6.number(), 0));
        return dump(channel, &request, |entry| entry.concerns(address));
    }
    let mut outbound = dump(
        channel,
        &by_source(cta::TUPLE_ORIG, filter::ORIG_FLAGS, address),
        |entry| entry.original.source == address,
    )?;
    let inbound = dump(
        channel,
        &by_source(cta::TUPLE_REPLY, filter::REPLY_FLAGS, address),
        // With both it talks to itself, and has been seen.
        |entry| entry.reply.source == address && entry.original.source != address,
    )?;
    outbound.extend(inbound);
    Ok(outbound)
}

fn by_source(tuple: u16, flags: u16, address: IpAddr) -> Request {
    let mut body = Body::netfilter(Family::of(address).number(), 0);
    body.nest(tuple, |body| {
        body.nest(wire::tuple::IP, |body| {
            match address {
                IpAddr::V4(a) => body.leaf(wire::ip::V4_SRC, &a.octets()),
                IpAddr::V6(a) => body.leaf(wire::ip::V6_SRC, &a.octets()),
            };
        });
    });
    body.nest(cta::FILTER, |body| {
        // Both have to be there; the other direction is not looked at.
        for kind in [filter::ORIG_FLAGS, filter::REPLY_FLAGS] {
            let bits = if kind == flags { filter::F_IP_SRC } else { 0 };
            body.leaf(kind, &bits.to_ne_bytes());
        }
    });
    Request::new(wire::CT_GET, body)
}

fn get(channel: &mut Channel, original: &Tuple, zone: u16) -> Result<Option<Entry>> {
    let request = Request::new(wire::CT_GET, naming(original, zone));
    match channel.ask("look up a connection", request) {
        Ok(answers) => Ok(answers.iter().find_map(|body| Entry::decode_body(body))),
        Err(e) if e.errno() == Some(Errno::NOENT) => Ok(None),
        Err(source) => Err(refused("look up", original, source)),
    }
}

fn marking(original: &Tuple, mark: Mark, mask: Mark) -> Request {
    let mut body = naming(original, 0);
    // The kernel computes (mark & ~mask) ^ value (`ctnetlink_change_mark`), so the value must not
    // have bits outside the mask.
    body.leaf(cta::MARK, &Mark::NONE.with(mark, mask).bits().to_be_bytes());
    body.leaf(cta::MARK_MASK, &mask.bits().to_be_bytes());
    Request::new(wire::CT_NEW, body)
}

/// A connection to be inserted is there already, or one that is in its way: by its original tuple
/// or by its reply tuple, each of which may be in the table once only.
fn settle(channel: &mut Channel, wanted: Entry) -> Result<()> {
    for tuple in [wanted.original, wanted.reply] {
        // A look-up finds an entry by the tuple of either direction.
        match get(channel, &tuple, wanted.zone)? {
            Some(existing)
                if existing.original == wanted.original && existing.reply == wanted.reply =>
            {
                let request = marking(&wanted.original, wanted.mark, Mark::MASK);
                return match channel.ask("mark a connection", request) {
                    Ok(_) => Ok(()),
                    Err(source) => Err(refused("mark", &wanted.original, source)),
                };
            }
            Some(existing) => {
                return Err(Error::Occupied {
                    wanted: Box::new(wanted),
                    existing: Box::new(existing),
                });
            }
            None => {}
        }
    }
    // What was in the way has ended in between.
    let request = Request::new(wire::CT_NEW, wanted.encode()).with(NlmF::CREATE | NlmF::EXCL);
    match channel.ask("insert a connection", request) {
        Ok(_) => Ok(()),
        Err(source) => Err(refused("insert", &wanted.original, source)),
    }
}
