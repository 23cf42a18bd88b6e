// The services a picture is classified with over Thrift: the buffered or framed transport and the
// binary protocol. Their method names differ, so that both are answered at one port.

struct InferenceParams {
  1: required string uuid,
  2: required binary data,
}

struct InferenceResult {
  1: required string label,
  2: required double score,
}

// A request that is not answered raises TApplicationException, INTERNAL_ERROR, with the reason.
service InferenceService {
  void ping(),
  InferenceResult infer_batch(1: InferenceParams params),
}

struct ProcessRequest {
  1: binary image_data,
}

struct ProcessResponse {
  1: bool success,
  2: string result_data,
  3: string error_message,
}

service ImageProcessingService {
  ProcessResponse process_image(1: ProcessRequest request),
}
