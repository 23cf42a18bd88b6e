-- Posts the files named on the command line, one after the other, and prints what came of it as
-- one line of JSON. Requests are written out beforehand: while it measures, wrk only sends them.

local requests, turn = {}, 0

function init(names)
  local headers = { ["Content-Type"] = "image/jpeg" }
  for number, name in ipairs(names) do
    local file = assert(io.open(name, "rb"))
    requests[number] = wrk.format("POST", nil, headers, file:read("*a"))
    file:close()
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors
  local failures = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.stdout:write(string.format(
    '{"requests":%d,"microseconds":%d,"failures":%d,"p50":%d,"p90":%d,"p99":%d,"mean":%f}\n',
    summary.requests, summary.duration, failures, latency:percentile(50), latency:percentile(90),
    latency:percentile(99), latency.mean
  ))
end
