//! Which pages are on the device, and their way to it and back.
//!
//! Pages are visited in the same order at every step, so the policy is fixed: as many pages as fit, less two, stay on
//! the device for good, from the first on; the others share the room of two. While one of those is updated, the next is
//! copied to the device, and the one before is copied to the host. (To evict the least recently used page would be the
//! worst choice here: that is the page which is needed next.)
//!
//! ```text
//! host      update 4        update 5        update 6
//! device    update 4 → out 4   update 5 → out 5
//! copies          in 5  ·  wait for out 3 · in 6
//! ```
//!
//! A page's download is queued right behind its update; the host waits for the download one page later, when the
//! page's room is needed. Pages of zeros that no step has touched take no memory anywhere.

use crate::budget::{Budget, MemorySource};
use crate::error::OptimError;
use host_copies::DeviceError;
use serde::{Deserialize, Serialize};

/// The device's side of the pager.
pub(crate) trait Memory {
    /// A page on the device.
    type Page;
    /// A page on its way to the host.
    type Leaving;
    /// A page on the host.
    type Host;

    /// A page of zeros on the device.
    fn zeros(&mut self, words: usize) -> Self::Page;
    /// Starts bringing a page to the device; whatever uses it there waits for it.
    fn upload(&mut self, page: Self::Host) -> Self::Page;
    /// Starts bringing a page to the host, behind everything that was given to the device before.
    fn download(&mut self, page: Self::Page) -> Self::Leaving;
    /// Waits for it.
    fn wait(&mut self, page: Self::Leaving) -> Result<Self::Host, DeviceError>;
    /// A page from words on the host.
    fn host(&mut self, words: Vec<u32>) -> Self::Host;
    /// The words of a page on the host.
    fn words<'a>(&self, page: &'a Self::Host) -> std::borrow::Cow<'a, [u32]>;
    /// The words of a page on the device, which stays there.
    fn read(&mut self, page: &Self::Page) -> Result<Vec<u32>, DeviceError>;
    /// Gives the memory of pages that are no longer on the device back to the driver.
    fn trim(&mut self);
}

/// What the pager did, and where the pages are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paging {
    /// Pages of state.
    pub pages: u64,
    /// Pages on the device.
    pub resident: u64,
    /// Pages in host memory.
    pub evicted: u64,
    /// Bytes of state on the device.
    pub resident_bytes: u64,
    /// Bytes brought to the device since the start.
    pub bytes_in: u64,
    /// Bytes brought to the host since the start.
    pub bytes_out: u64,
}

enum Place<M: Memory> {
    /// Zeros; nowhere.
    Untouched,
    Device(M::Page),
    Leaving(M::Leaving),
    Host(M::Host),
    /// Only while it changes places, or after a failed copy.
    Lost,
}

struct Page<M: Memory> {
    words: usize,
    place: Place<M>,
}

impl<M: Memory> Page<M> {
    fn bytes(&self) -> u64 {
        4 * self.words as u64
    }

    fn on_device(&self) -> bool {
        matches!(self.place, Place::Device(_) | Place::Leaving(_))
    }
}

/// Pages and their places.
pub(crate) struct Pager<M: Memory> {
    pub(crate) memory: M,
    pages: Vec<Page<M>>,
    budget: Budget,
    source: Box<dyn MemorySource>,
    /// Bytes that `Budget::Auto` leaves alone beyond its share of the device: what shortages have taught.
    reserve: u64,
    bytes_in: u64,
    bytes_out: u64,
}

/// How many pages stay, from the first on, and whether there is room for a page to come ahead of its use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    keep: usize,
    ahead: bool,
}

fn plan(sizes: &[u64], limit: u64) -> Plan {
    if sizes.iter().sum::<u64>() <= limit {
        return Plan { keep: sizes.len(), ahead: true };
    }
    let largest = sizes.iter().copied().max().unwrap_or(0);
    let mut room = limit.saturating_sub(2 * largest);
    let fits = |size: &&u64| match room.checked_sub(**size) {
        Some(rest) => {
            room = rest;
            true
        }
        None => false,
    };
    Plan { keep: sizes.iter().take_while(fits).count(), ahead: limit >= 2 * largest }
}

impl<M: Memory> Pager<M> {
    /// Pages of zeros of these sizes.
    pub(crate) fn new(memory: M, words: &[usize], budget: Budget, source: Box<dyn MemorySource>) -> Self {
        let pages = words.iter().map(|&words| Page { words, place: Place::Untouched }).collect();
        Self { memory, pages, budget, source, reserve: 0, bytes_in: 0, bytes_out: 0 }
    }

    /// What was done so far.
    pub(crate) fn paging(&self) -> Paging {
        let resident = self.pages.iter().filter(|page| page.on_device());
        Paging {
            pages: self.pages.len() as u64,
            resident: resident.clone().count() as u64,
            evicted: self.pages.iter().filter(|page| matches!(page.place, Place::Host(_))).count() as u64,
            resident_bytes: resident.map(Page::bytes).sum(),
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
        }
    }

    /// Bytes of state that may be on the device now.
    fn limit(&mut self) -> u64 {
        match self.budget {
            Budget::Unlimited => u64::MAX,
            Budget::Bytes(bytes) => bytes,
            Budget::Auto => {
                let resident = self.paging().resident_bytes;
                match self.source.free(resident) {
                    None => u64::MAX,
                    // A thirty-second of the device stays free, for what the allocator and the driver do.
                    Some((free, total)) => (resident + free).saturating_sub(total / 32).saturating_sub(self.reserve),
                }
            }
        }
    }

    /// Calls `visit` with every page of `order`, which is ascending, on the device.
    ///
    /// # Errors
    /// A copy to the host failed.
    pub(crate) fn visit(
        &mut self,
        order: &[usize],
        mut visit: impl FnMut(&mut M, usize, &mut M::Page),
    ) -> Result<(), OptimError> {
        let limit = self.limit();
        let sizes: Vec<u64> = self.pages.iter().map(Page::bytes).collect();
        let Plan { keep, ahead } = plan(&sizes, limit);
        self.evict_beyond(keep)?;
        for (position, &index) in order.iter().enumerate() {
            self.arrive(index);
            if let Place::Device(page) = &mut self.pages[index].place {
                visit(&mut self.memory, index, page);
            }
            let stays = index < keep;
            if !stays {
                self.leave(index);
            }
            let next = order.get(position + 1).copied();
            // The previous page's download ran during this page's update; wait for it now.
            for earlier in (0..self.pages.len()).filter(|&i| !ahead || i != index) {
                self.left(earlier)?;
            }
            if let Some(next) = next.filter(|&next| next < keep || ahead) {
                // Zeros are made where they are needed.
                if matches!(self.pages[next].place, Place::Host(_)) {
                    self.arrive(next);
                }
            }
        }
        Ok(())
    }

    /// Moves everything to the host and gives the memory back. Returns how many bytes that were; with
    /// [`Budget::Auto`], they are left free from now on.
    ///
    /// # Errors
    /// A copy to the host failed.
    pub(crate) fn make_room(&mut self) -> Result<u64, OptimError> {
        if self.budget == Budget::Unlimited {
            return Ok(0);
        }
        let freed = self.paging().resident_bytes;
        self.evict_beyond(0)?;
        self.memory.trim();
        self.reserve += freed;
        Ok(freed)
    }

    /// Sends pages from `keep` on away, and waits until they have left.
    fn evict_beyond(&mut self, keep: usize) -> Result<(), OptimError> {
        // Pages that only pass through were sent on their way at once, and their room is used again.
        let shrinks = self.pages.iter().skip(keep).any(|page| matches!(page.place, Place::Device(_)));
        (keep..self.pages.len()).for_each(|index| self.leave(index));
        (0..self.pages.len()).try_for_each(|index| self.left(index))?;
        if shrinks {
            self.memory.trim();
        }
        Ok(())
    }

    /// Brings a page to the device, or lets it go there.
    fn arrive(&mut self, index: usize) {
        let page = &mut self.pages[index];
        page.place = match std::mem::replace(&mut page.place, Place::Lost) {
            Place::Untouched => Place::Device(self.memory.zeros(page.words)),
            Place::Host(host) => {
                self.bytes_in += page.bytes();
                Place::Device(self.memory.upload(host))
            }
            place => place,
        };
    }

    /// Starts a page's way to the host.
    fn leave(&mut self, index: usize) {
        let page = &mut self.pages[index];
        page.place = match std::mem::replace(&mut page.place, Place::Lost) {
            Place::Device(on_device) => {
                self.bytes_out += page.bytes();
                Place::Leaving(self.memory.download(on_device))
            }
            place => place,
        };
    }

    /// Waits for a page that is on its way to the host.
    fn left(&mut self, index: usize) -> Result<(), OptimError> {
        let page = &mut self.pages[index];
        if matches!(page.place, Place::Leaving(_))
            && let Place::Leaving(leaving) = std::mem::replace(&mut page.place, Place::Lost)
        {
            page.place = Place::Host(self.memory.wait(leaving)?);
        }
        Ok(())
    }

    /// Calls `read` with the words of every page that is not zeros.
    ///
    /// # Errors
    /// A copy to the host failed.
    pub(crate) fn read(&mut self, mut read: impl FnMut(usize, &[u32])) -> Result<(), OptimError> {
        for index in 0..self.pages.len() {
            self.left(index)?;
            match &self.pages[index].place {
                Place::Device(page) => read(index, &self.memory.read(page)?),
                Place::Host(host) => read(index, &self.memory.words(host)),
                Place::Untouched => {}
                Place::Leaving(_) | Place::Lost => {
                    return Err(DeviceError::Failed(format!("page {index} was lost when a copy failed")).into());
                }
            }
        }
        Ok(())
    }

    /// Puts words in place of a page's; they go to the device when they are needed there.
    pub(crate) fn write(&mut self, index: usize, words: Vec<u32>) {
        self.pages[index].place = Place::Host(self.memory.host(words));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::borrow::Cow;
    use std::sync::{Arc, Mutex};

    /// A device of pages of one word that counts what is on it.
    #[derive(Default)]
    struct Fake {
        resident: usize,
        peak: usize,
        log: Vec<String>,
        trims: usize,
    }

    impl Fake {
        fn arrived(&mut self, page: Vec<u32>) -> Vec<u32> {
            self.resident += 1;
            self.peak = self.peak.max(self.resident);
            page
        }
    }

    impl Memory for Fake {
        type Page = Vec<u32>;
        type Leaving = Vec<u32>;
        type Host = Vec<u32>;

        fn zeros(&mut self, words: usize) -> Vec<u32> {
            self.arrived(vec![0; words])
        }
        fn upload(&mut self, page: Vec<u32>) -> Vec<u32> {
            self.log.push(format!("in {}", page[0] % 100));
            self.arrived(page)
        }
        fn download(&mut self, page: Vec<u32>) -> Vec<u32> {
            self.log.push(format!("out {}", page[0] % 100));
            page
        }
        fn wait(&mut self, page: Vec<u32>) -> Result<Vec<u32>, DeviceError> {
            self.resident -= 1;
            self.log.push(format!("gone {}", page[0] % 100));
            Ok(page)
        }
        fn host(&mut self, words: Vec<u32>) -> Vec<u32> {
            words
        }
        fn words<'a>(&self, page: &'a Vec<u32>) -> Cow<'a, [u32]> {
            page.into()
        }
        fn read(&mut self, page: &Vec<u32>) -> Result<Vec<u32>, DeviceError> {
            Ok(page.clone())
        }
        fn trim(&mut self) {
            self.trims += 1;
        }
    }

    const PAGES: usize = 10;

    /// Page i holds i, plus 100 for each step.
    fn step(pager: &mut Pager<Fake>) {
        let order: Vec<usize> = (0..PAGES).collect();
        pager
            .visit(&order, |memory, index, page| {
                memory.log.push(format!("use {index}"));
                assert!(page[0] == 0 || page[0] % 100 == index as u32);
                page[0] = if page[0] == 0 { 100 + index as u32 } else { page[0] + 100 };
            })
            .unwrap();
    }

    fn contents(pager: &mut Pager<Fake>) -> Vec<u32> {
        let mut found = vec![0; PAGES];
        pager.read(|index, words| found[index] = words[0]).unwrap();
        found
    }

    fn pager(budget: Budget, source: Box<dyn MemorySource>) -> Pager<Fake> {
        Pager::new(Fake::default(), &[1; PAGES], budget, source)
    }

    #[test]
    fn a_budget_is_kept_and_does_not_show_in_the_contents() {
        let expected: Vec<u32> = (0..PAGES as u32).map(|i| 300 + i).collect();
        for pages in 0..=12_u64 {
            let mut pager = pager(Budget::Bytes(4 * pages), Box::new(crate::budget::Unknown));
            (0..3).for_each(|_| step(&mut pager));
            assert!(pager.memory.peak as u64 <= pages.max(1), "{pages}: {}", pager.memory.peak);
            assert_eq!(pager.paging().resident_bytes, 4 * pager.memory.resident as u64);
            assert_eq!(contents(&mut pager), expected);
            let keep = if pages >= 10 { 10 } else { pages.saturating_sub(2) };
            // Every step but the first brings the pages in that are not kept.
            assert_eq!(pager.paging().bytes_in, 2 * 4 * (10 - keep));
            assert_eq!(pager.paging().bytes_out, 3 * 4 * (10 - keep));
        }
    }

    #[test]
    fn the_next_page_is_on_its_way_before_this_one_has_left() {
        let mut pager = pager(Budget::Bytes(4 * 3), Box::new(crate::budget::Unknown));
        step(&mut pager);
        pager.memory.log.clear();
        step(&mut pager);
        let log = pager.memory.log.join(", ");
        assert!(log.contains("use 4, out 4, gone 3, in 5, use 5, out 5, gone 4, in 6, use 6"), "{log}");
    }

    /// A device of ten words whose other tenants grow; its reserve is ten bytes.
    #[derive(Clone)]
    struct Shared(Arc<Mutex<u64>>);

    impl MemorySource for Shared {
        fn free(&mut self, resident: u64) -> Option<(u64, u64)> {
            let others = *self.0.lock().unwrap();
            Some((40_u64.checked_sub(others + resident).unwrap(), 320))
        }
    }

    #[test]
    fn state_makes_way_as_others_grow_and_comes_back() {
        let others = Shared(Arc::default());
        let mut pager = pager(Budget::Auto, Box::new(others.clone()));
        let mut resident = Vec::new();
        for words in [0, 2, 4, 6, 8, 6, 4, 2, 0] {
            // The source sees to it that there was room for them.
            *others.0.lock().unwrap() = 4 * words;
            pager.memory.peak = 0;
            step(&mut pager);
            resident.push(pager.paging().resident);
            // One page at a time is the least.
            let room = (30 - 4 * words as i64).max(4) / 4;
            assert!(pager.memory.resident as i64 <= room, "{words}: {}", pager.memory.resident);
        }
        assert_eq!(contents(&mut pager), (0..PAGES as u32).map(|i| 900 + i).collect::<Vec<_>>());
        assert!(resident[..4].windows(2).all(|w| w[0] > w[1]) && resident[0] == resident[8], "{resident:?}");
        assert!(pager.memory.trims > 0, "what was left goes back to the driver");
    }

    #[test]
    fn room_that_had_to_be_made_stays_free() {
        let others = Shared(Arc::default());
        let mut pager = pager(Budget::Auto, Box::new(others));
        step(&mut pager);
        let freed = pager.make_room().unwrap();
        assert!(freed >= 4 * 5 && pager.paging().resident == 0, "{freed}");
        step(&mut pager);
        assert!(pager.paging().resident_bytes <= 30 - freed);
        assert_eq!(contents(&mut pager), (0..PAGES as u32).map(|i| 200 + i).collect::<Vec<_>>());
        assert_eq!(pager.paging().pages, 10);
        let mut unlimited = self::pager(Budget::Unlimited, Box::new(crate::budget::Unknown));
        step(&mut unlimited);
        assert_eq!(unlimited.make_room().unwrap(), 0, "a user who said unlimited meant it");
    }

    #[test]
    fn plans() {
        assert_eq!(plan(&[], 0), Plan { keep: 0, ahead: true });
        assert_eq!(plan(&[4, 4, 4], 12), Plan { keep: 3, ahead: true });
        assert_eq!(plan(&[4, 4, 4], 11), Plan { keep: 0, ahead: true });
        assert_eq!(plan(&[4, 4, 4, 4], 12), Plan { keep: 1, ahead: true });
        assert_eq!(plan(&[4, 4, 4, 4], 7), Plan { keep: 0, ahead: false });
    }
}
