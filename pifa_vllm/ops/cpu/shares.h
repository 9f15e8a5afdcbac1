// Rows handed out to threads while they last: a core that another process delays gets fewer.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "layer.h"

namespace pifa {

// Many rows at first, and single tiles of them at the end, so that no thread waits long for the others.
class Shares {
 public:
  // A run of rows of one group.
  struct Share {
    size_t group;
    int64_t begin, end;
  };

  explicit Shares(int threads) : threads_(threads) {}

  // Rows that are never handed out together with those of other groups: in multiples of `tile`, at most `most` of them.
  void add(int64_t rows, int64_t tile, int64_t most) {
    groups_.push_back({rows, tile, std::max<int64_t>(most, 1), count_});
    count_ += (rows + tile - 1) / tile;
  }

  bool take(Share& share) {
    for (int64_t begin = next_; begin < count_;) {
      size_t group = groups_.size() - 1;
      while (groups_[group].first > begin) --group;
      const Group& g = groups_[group];
      const int64_t left = (g.rows + g.tile - 1) / g.tile - (begin - g.first);
      const int64_t tiles = std::min(std::clamp<int64_t>((count_ - begin) / (4 * threads_), 1, g.most), left);
      if (!next_.compare_exchange_weak(begin, begin + tiles)) continue;
      const int64_t row = (begin - g.first) * g.tile;
      share = {group, row, std::min(row + tiles * g.tile, g.rows)};
      return true;
    }
    return false;
  }
  void restart() { next_ = 0; }

 private:
  struct Group {
    int64_t rows, tile, most, first;  // first: tiles of the groups before it
  };

  int threads_;
  int64_t count_ = 0;
  std::vector<Group> groups_;
  std::atomic<int64_t> next_{0};
};

}  // namespace pifa
